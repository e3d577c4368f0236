"""Run by test_simt.py in a process of its own, under AddressSanitizer: every op on backend simt."""

import importlib

import torch

import rayfuse
from conftest import DTYPES
from rayfuse.ops import STEMS


def run_all():
    for stem in STEMS:
        (contract,) = (
            value
            for name, value in vars(importlib.import_module(f"test_{stem}")).items()
            if name.startswith("Test")
        )
        suite = contract()
        for dtype in DTYPES:
            for sizes in (*suite.sizes, *suite.gpu_sizes):
                args = suite.inputs((2,), dtype, **sizes)
                with rayfuse.use_backend("simt"):
                    outputs, grads = suite.gradients(args)
                # a gradient over 65,536 samples may overflow half precision
                assert not any(torch.isnan(x).any() for x in (*outputs, *grads))
