from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ..domain import csr
from ..op import op
from ..packed import PackedOp, PackedRays

__all__ = ["exclusive_prod", "exclusive_sum", "inclusive_prod", "inclusive_sum", "packed_scan"]


@op("x[P] offsets[R+1] -> y[P]", domain=dict(offsets=csr), base=PackedOp)
def packed_scan(
    x: Tensor,
    offsets: Tensor,
    *,
    kind: Literal["sum", "prod"] = "sum",
    exclusive: bool = False,
    reverse: bool = False,
) -> Tensor:
    """Running sums or products along packed rays: y_i is that of x_j, j <= i, of the same ray.

    The gradient of a product divides by nothing and is exact wherever x is 0. A sum of a million
    samples loses no more to rounding than one of a few.

    Args:
        x: [P] values of the samples.
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1]. They rise from 0
            to P. On a GPU, where a look at them would synchronise, others give wrong values in
            silence unless in debug mode.

    Keyword Args:
        kind: `"sum"` or `"prod"`.
        exclusive: y_i leaves out x_i itself: a ray begins with 0, or with 1 for a product.
        reverse: from the last sample of a ray to the first: y_i is that of x_j, j >= i.

    Returns:
        y: [P], float32 for half precision inputs. Differentiable in x, twice through the reference.

    Raises:
        ValueError: for shapes or devices that do not match, for another kind, and for offsets on
            the CPU that do not rise from 0 to P.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, and for offsets that
            are not int64.
        NotImplementedError: under vmap: concatenate the batch instead.

    Source:
        Blelloch, Prefix sums and their applications (1990); Li et al., NerfAcc (2023),
        `inclusive_sum` to `exclusive_prod`. docs/compositing.md

    Example:
        >>> import torch, rayfuse
        >>> x, offsets = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 3, 3, 4])
        >>> rayfuse.packed_scan(x, offsets, exclusive=True, reverse=True)
        tensor([5., 3., 0., 0.])
    """
    if reverse:
        mirrored = x.flip(0), len(x) - offsets.flip(0)
        y = packed_scan.op.reference(*mirrored, kind=kind, exclusive=exclusive, reverse=False)
        return y.flip(0)
    rays = PackedRays(offsets, len(x))
    y = rays.running_sum(x) if kind == "sum" else rays.running_product(x)
    return rays.before(y, 0.0 if kind == "sum" else 1.0) if exclusive else y


def inclusive_sum(x: Tensor, offsets: Tensor | None = None, **options: Any) -> Tensor:
    """The sum of each sample and those before it in its ray: `packed_scan`.

    Args:
        x: [P] values of the samples.
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1].

    Keyword Args:
        ray_indices, rays: in place of offsets (`ray_offsets`).
        reverse: those after it, in place of those before it.

    Returns:
        y: [P].

    Example:
        >>> import torch, rayfuse
        >>> rayfuse.inclusive_sum(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 3]))
        tensor([1., 3., 3.])
    """
    return _scan(x, offsets, options, "sum", exclusive=False)


def exclusive_sum(x: Tensor, offsets: Tensor | None = None, **options: Any) -> Tensor:
    """The sum of the samples before each one in its ray, 0 for the first: see `inclusive_sum`.

    Example:
        >>> import torch, rayfuse
        >>> rayfuse.exclusive_sum(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 3]))
        tensor([0., 1., 0.])
    """
    return _scan(x, offsets, options, "sum", exclusive=True)


def inclusive_prod(x: Tensor, offsets: Tensor | None = None, **options: Any) -> Tensor:
    """The product of each sample and those before it in its ray: see `inclusive_sum`.

    Example:
        >>> import torch, rayfuse
        >>> rayfuse.inclusive_prod(torch.tensor([2.0, 3.0, 4.0]), torch.tensor([0, 2, 3]))
        tensor([2., 6., 4.])
    """
    return _scan(x, offsets, options, "prod", exclusive=False)


def exclusive_prod(x: Tensor, offsets: Tensor | None = None, **options: Any) -> Tensor:
    """The product of the samples before each one in its ray, 1 for the first: see `inclusive_sum`.

    Example:
        >>> import torch, rayfuse
        >>> ray_indices = torch.tensor([0, 0, 2])
        >>> rayfuse.exclusive_prod(torch.tensor([2.0, 3.0, 4.0]), ray_indices=ray_indices, rays=3)
        tensor([1., 2., 1.])
    """
    return _scan(x, offsets, options, "prod", exclusive=True)


def _scan(
    x: Tensor, offsets: Tensor | None, options: dict[str, Any], kind: str, exclusive: bool
) -> Tensor:
    places = {} if offsets is None else {"offsets": offsets}
    return packed_scan(x, kind=kind, exclusive=exclusive, **places, **options)
