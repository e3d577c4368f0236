"""What only Zip-NeRF's interlevel loss knows: the published form, its limits, its smoothness."""

import pytest
import torch

import rayfuse
from contract import Contract


class TestZipInterlevelLoss(Contract):
    op = rayfuse.zip_interlevel_loss
    sizes = tuple(
        {"S": S, "E": E}
        for S, E in (
            *((1, 1), (2, 1), (1, 2), (3, 5), (8, 4), (4, 17), (16, 16), (17, 18), (31, 15)),
            *((48, 96), (33, 257), (130, 140)),
        )
    )
    typical = {"S": 11, "E": 9}
    variants = ({"pulse_width": 0.05}, {"pulse_width": 0.3, "eps": 1e-3})
    gpu_sizes = ({"S": 48, "E": 96}, {"S": 32, "E": 64}, {"S": 4096, "E": 4096})
