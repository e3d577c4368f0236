from __future__ import annotations

from torch import Tensor

from ..domain import csr
from ..op import op
from ..packed import PackedOp, PackedRays

__all__ = ["packed_render_features"]


@op(
    "w[P] f[P, C] offsets[R+1] -> features[R, C]",
    domain=dict(offsets=csr),
    narrow=("f",),
    base=PackedOp,
)
def packed_render_features(w: Tensor, f: Tensor, offsets: Tensor) -> Tensor:
    """Features of each packed ray: sum_k w_k f_k over its samples.

    `render_features` for rays with any numbers of samples, empty rays included. No product of the
    size of f is ever stored, and f is read as it is (docs/features.md).

    Args:
        w: [P] weights of the samples, dimensionless.
        f: [P, C] features of the samples, any C, any unit; float16 or bfloat16 where w is float32,
            or of the dtype of w.
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1]. They rise from 0
            to P. On a GPU, where a look at them would synchronise, others give wrong values in
            silence unless in debug mode.

    Returns:
        [R, C], in the unit of f; exactly 0 for an empty ray. float32 for half precision inputs.
        Differentiable in w and f, twice through the reference.

    Raises:
        ValueError: for shapes or devices that do not match, and for offsets on the CPU that do not
            rise from 0 to P.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ, but
            for an f of half precision, and for offsets that are not int64.
        NotImplementedError: under vmap: concatenate the batch instead.

    Source:
        Shen et al., Distilled Feature Fields Enable Few-Shot Language-Guided Manipulation (F3RM,
        2023), section 3.1, on the packed rays of nerfacc's `accumulate_along_rays`.

    Example:
        >>> import torch, rayfuse
        >>> w = torch.tensor([0.25, 0.75, 1.0])
        >>> f = torch.tensor([[0.0, 4.0], [4.0, 4.0], [2.0, 1.0]])
        >>> rayfuse.packed_render_features(w, f, torch.tensor([0, 2, 2, 3]))
        tensor([[3., 4.],
                [0., 0.],
                [2., 1.]])
    """
    return PackedRays(offsets, len(w)).total(w[:, None] * f)
