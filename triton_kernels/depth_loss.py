# Losses of a measured depth D, the formulas of csrc/cpu/depth_loss.cpp: L = sum_i l_i f_i +
# (D - D_pred)^2 with z = s - D and a bell K = a exp(-z^2 / (2 v)). DS-NeRF: f = -log(w + eps) K.
# Urban Radiance Fields: f = e^2 with e = w - K within sigma of D, w before it and 0 behind.
# d_w = -l K / (w + eps), or 2 l e; d_s = l log(w + eps) K z / v, or 2 l e K z / v near D.
# A program owns BLOCK_R rays and goes over each once, BLOCK_S samples at a time. docs/depth.md.
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import accumulator, empty_gradient, launch


@triton.jit
def depth_loss_fwd_kernel(
    loss_ptr,  # [R]
    w_ptr,  # [R, S]
    s_ptr,  # [R, S]
    depth_ptr,  # [R]
    lengths_ptr,  # [R, S]
    depth_pred_ptr,  # [R]
    constants_ptr,  # [4]
    R,
    S,
    URBAN: tl.constexpr,
    LENGTHS: tl.constexpr,
    DEPTH_PRED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    A: tl.constexpr = loss_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
