"""Run by `make test-abi` under another torch: the libraries load and agree with the reference."""

import torch

import rayfuse
from rayfuse import backend

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
