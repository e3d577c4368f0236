"""Search in, and sampling from, the histograms along rays, dense and packed, as nerfacc's CUDA
kernels define them, on any device: what `rayfuse.lookups` has of them."""

from .lookups import (
    importance_samples,
    importance_sampling,
    packed_importance_samples,
    packed_importance_sampling,
    packed_intervals_around,
    packed_searchsorted,
    searchsorted,
)

__all__ = [
    "importance_samples",
    "importance_sampling",
    "packed_importance_samples",
    "packed_importance_sampling",
    "packed_intervals_around",
    "packed_searchsorted",
    "searchsorted",
]
