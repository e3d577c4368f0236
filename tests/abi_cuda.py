"""Run by `make test-cuda-abi` under a torch with CUDA, GPU or none: the CUDA library loads."""

import torch

from rayfuse import backend
from rayfuse.ops import STEMS

assert torch.version.cuda, "this torch has no CUDA"
assert backend.library_path("cuda").exists(), "no library to load: build it with RAYFUSE_CUDA=1"
failure = backend.load_cuda_library()
assert failure is None, failure
for stem in STEMS:
    for op in (stem, f"{stem}_bwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rayfuse_cuda::{op}", "CUDA"), op
print(f"torch {torch.__version__}: librayfuse_cuda.so loads and holds every op")
