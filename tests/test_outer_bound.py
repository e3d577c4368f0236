"""What only the outer bound knows: its three rules outside, torch.searchsorted to the bit."""

import pytest
import torch

import rayfuse
from contract import Contract


class TestOuterBound(Contract):
    op = rayfuse.outer_bound
    # around the registers' lanes, the nodes of 16 edges, and what users train with
    sizes = tuple(
        {"S": S, "E": E}
        for S, E in (
            *((1, 1), (2, 1), (1, 2), (3, 5), (8, 4), (4, 17), (16, 16), (17, 18), (15, 33)),
            *((48, 96), (33, 257), (130, 31), (70, 300)),
        )
    )
    typical = {"S": 11, "E": 19}
    variants = ({}, {"outside": "zero"}, {"outside": "below_zero"})
    gpu_sizes = ({"S": 48, "E": 96}, {"S": 48, "E": 256}, {"S": 4096, "E": 4096})
