"""Run by `make test-abi` under another torch: the libraries load and agree with the reference, ops
compile, and so do the Triton kernels with the triton that this torch brings, if it brings one."""

import importlib.util
import os
from pathlib import Path

# before triton is imported; the CUDA sources want the headers of the torch that they are built with
os.environ |= {"TRITON_INTERPRET": "0", "RAYFUSE_SIMT": "0"}

import torch

import rayfuse
from rayfuse import backend
from rayfuse.ops import STEMS

assert backend.isas(), "no library to load"
for isa in backend.isas():
    t, w = (x.requires_grad_() for x in rayfuse.distortion_loss.op.sample((33,), S=48))
    results = []
    for name in ("ref", f"cpu.{isa}"):
        with rayfuse.use_backend(name):
            loss = rayfuse.distortion_loss(t, w)
            assert rayfuse.last_backend() == name
        results.append((loss.detach(), *torch.autograd.grad(loss, (t, w))))
    torch.testing.assert_close(results[1], results[0])
    print(f"torch {torch.__version__}: librayfuse_cpu.{isa}.so loads and is right")


def opaque(t, w):
    return rayfuse.ray_weights(w, t, opaque_background=True)[0].square().sum()


compiled = torch.compile(opaque, fullgraph=True, backend="aot_eager")
grads = (torch.autograd.grad(f(t, w), (t, w)) for f in (compiled, opaque))
torch.testing.assert_close(*grads)
print(f"torch {torch.__version__}: torch.compile takes an op without a graph break")

if importlib.util.find_spec("triton"):
    # where the kernels lie in a tree that is not installed
    rayfuse.__path__.append(str(Path(__file__).parent.parent))
    import triton

    import gpu_code

    gpu_code.triton_figures(STEMS, [torch.float32, torch.float64], ["sm_90"])
    print(f"triton {triton.__version__}: compiles the kernels of {len(STEMS)} ops")
