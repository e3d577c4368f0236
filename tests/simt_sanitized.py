"""Run by test_simt.py in a process of its own, under AddressSanitizer: every op on backend simt."""

import importlib
from itertools import product

import torch

import gpu_figures
import rayfuse
from conftest import DTYPES
from rayfuse.ops import STEMS


def run_all():
    for stem in STEMS:
        module = importlib.import_module(f"test_{stem}")
        (tests,) = (value for name, value in vars(module).items() if name.startswith("Test"))
        figures = gpu_figures.contract(stem)
        for suite, every in ((tests(), tests.sizes), (figures(), figures.gpu_sizes)):
            for dtype, sizes in product(DTYPES, every):
                args = suite.inputs((2,), dtype, **sizes)
                with rayfuse.use_backend("simt"):
                    outputs, grads = suite.gradients(args)
                # a gradient over 65,536 samples may overflow half precision
                assert not any(torch.isnan(x).any() for x in (*outputs, *grads))
