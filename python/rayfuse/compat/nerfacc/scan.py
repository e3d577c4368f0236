"""nerfacc.scan: running sums and products along rays, on packed_scan."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from .pack import packed_rays

__all__ = ["exclusive_prod", "exclusive_sum", "inclusive_prod", "inclusive_sum"]


def inclusive_sum(
    inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None
) -> Tensor:
    """The sum of each ray up to each of its values.

    Args:
        inputs: [..., S], along whose last dimension rays lie, or [P] with all rays end to end.
        packed_info: [R, 2] where the values of each ray begin in [P], and how many it has.
        indices: [P] in place of packed_info: values next to each other with the same number are of
            one ray.

    Returns:
        The shape of inputs. Differentiable, twice through the reference.

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> nerfacc.inclusive_sum(torch.tensor([1.0, 2, 3, 4]), torch.tensor([[0, 1], [1, 3]]))
        tensor([1., 2., 5., 9.])
    """
    return _scan(inputs, packed_info, indices, kind="sum")


def exclusive_sum(
    inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None
) -> Tensor:
    """The sum of what comes before each value on its ray; see `inclusive_sum`.

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> nerfacc.exclusive_sum(torch.tensor([1.0, 2, 3, 4]), torch.tensor([[0, 1], [1, 3]]))
        tensor([0., 0., 2., 5.])
    """
    return _scan(inputs, packed_info, indices, kind="sum", exclusive=True)


def inclusive_prod(
    inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None
) -> Tensor:
    """The product of each ray up to each of its values; see `inclusive_sum`.

    The gradient divides by nothing, and is exact where values are 0.

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> nerfacc.inclusive_prod(torch.tensor([1.0, 2, 3, 4]), torch.tensor([[0, 1], [1, 3]]))
        tensor([ 1.,  2.,  6., 24.])
    """
    return _scan(inputs, packed_info, indices, kind="prod")


def exclusive_prod(
    inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None
) -> Tensor:
    """The product of what comes before each value on its ray; see `inclusive_prod`.

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> nerfacc.exclusive_prod(torch.tensor([1.0, 2, 3, 4]), torch.tensor([[0, 1], [1, 3]]))
        tensor([1., 1., 2., 6.])
    """
    return _scan(inputs, packed_info, indices, kind="prod", exclusive=True)


def _scan(
    inputs: Tensor,
    packed_info: Tensor | None,
    indices: Tensor | None,
    kind: str,
    exclusive: bool = False,
) -> Tensor:
    if indices is not None and packed_info is not None:
        raise ValueError("give packed_info or indices, got both")
    if indices is not None:
        # the numbers of rays need not rise; how many rays there are, only the values say
        first = (indices[1:] != indices[:-1]).nonzero()[:, 0] + 1
        offsets = torch.cat([first.new_zeros(1), first, first.new_tensor([len(indices)])])
        x = inputs
    else:
        x, offsets = packed_rays(inputs, packed_info=packed_info)
    return ops.packed_scan(x, offsets, kind=kind, exclusive=exclusive).view(inputs.shape)
