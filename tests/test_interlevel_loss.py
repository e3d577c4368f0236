"""What only the interlevel loss knows."""

import rayfuse
from contract import Contract


class TestInterlevelLoss(Contract):
    op = rayfuse.interlevel_loss
    sizes = tuple(
        {"S": S, "E": E}
        for S, E in (
            *((1, 1), (2, 1), (1, 2), (3, 5), (8, 4), (4, 17), (16, 16), (17, 18), (15, 33)),
            *((48, 96), (33, 257), (130, 31), (70, 300)),
        )
    )
    typical = {"S": 11, "E": 9}
    variants = ({}, {"outside": "zero"}, {"outside": "below_zero"}, {"eps": 1e-3})
    gpu_sizes = ({"S": 48, "E": 96}, {"S": 48, "E": 256}, {"S": 4096, "E": 4096})
