# Compositing, the formulas of csrc/cpu/composite_rays.cpp: features = sum_i w_i f_i +
# (1 - sum_i w_i) background, g_i = d_features . (f_i - background) + d_accumulation +
# d_depth (s_i - depth) / sum_i w_i, d_f_i = w_i d_features; w given or from densities.
# A program owns BLOCK_R rays and takes BLOCK_S samples of each, and BLOCK_C channels, at a time.
# Forward: once over f, and over t and w for each BLOCK_C. Backward: t and w from the left for the
# sums, then everything from the right. Shifted and second loads hit the L1 cache.
# docs/compositing.md
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    accumulator,
    bounded,
    empty_gradient,
    is_wall,
    launch,
    light_at,
    load,
    of_block,
    optical_depth,
    stopped,
    sums_of_loaded,
)

_MAX_CHANNELS = 8
_EXPECTED, _LOG_MEAN, _MEDIAN, _NONE = (tl.constexpr(i) for i in range(4))
_EXPECTED_EPS = tl.constexpr(1e-10)
_LOG_MEAN_EPS = tl.constexpr(2.0**-23)


@triton.jit
def composite_rays_fwd_kernel(
    features_ptr,  # [R, C]
    depth_ptr,  # [R]
    accumulation_ptr,  # [R]
    t_ptr,  # [R, S+1]
    w_ptr,  # [R, S]
    f_ptr,  # [R, S, C]
    background_ptr,  # [R, C]
    R,
    S,
    C,
    t_stride_r,
    HAS_F: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    LAST_SAMPLE: tl.constexpr,
    DEPTH: tl.constexpr,
    DENSITY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    A: tl.constexpr = depth_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    t_ptrs, w_ptrs = t_ptr + (r * t_stride_r)[:, None], w_ptr + (r * S)[:, None]
    is_ray, has_samples = r < R, r < R * tl.minimum(S, 1)
    ray = is_ray[:, None]
    for start_c in range(0, tl.maximum(C, 1), BLOCK_C):
        c = start_c + tl.arange(0, BLOCK_C)
        channel = ray & (c < C)[None, :]
        features = tl.zeros([BLOCK_R, BLOCK_C], A)
        depth = tl.zeros([BLOCK_R], A)
        weight = tl.zeros([BLOCK_R], A)
        moment = tl.zeros([BLOCK_R], A)
        below = tl.zeros([BLOCK_R], A)
        for start in range(0, S, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)[None, :]
            here = ray & (s < S)
            w, _ = _weigh(t_ptrs, w_ptrs, s, here, depth, DENSITY, A)
            if HAS_F:
                f = _features(f_ptr, r, s, c, here, channel, S, C, A)
                features += tl.sum(w[:, :, None] * f, 1)
            if DEPTH == _MEDIAN:
                sums = weight[:, None] + tl.cumsum(w, 1)
                below += tl.sum((here & (sums < 0.5)).to(A), 1)
            elif DEPTH != _NONE:
                place = _place(_mid(t_ptrs, s, here, A), DEPTH, A)
                moment += tl.sum(tl.where(here, w * place, 0.0), 1)
            weight += sums_of_loaded(w)
            if DENSITY:
                before = here & (s > 0)
                depth += tl.sum(optical_depth(w_ptrs, t_ptrs, s - 1, before, A), 1)
        behind = _behind(
            f_ptr,
            background_ptr,
            r,
            c,
            channel,
            has_samples,
            S,
            C,
            HAS_F,
            HAS_BACKGROUND,
            LAST_SAMPLE,
            A,
        )
        features += (1.0 - weight)[:, None] * behind
        tl.store(features_ptr + (r * C)[:, None] + c[None, :], features, mask=channel)
        if start_c == 0:
            value, _, _, _, _ = _depth(
                weight, moment, below, t_ptr, r, has_samples, S, t_stride_r, DEPTH, A
            )
            tl.store(depth_ptr + r, value, mask=is_ray)
            tl.store(accumulation_ptr + r, weight, mask=is_ray)


@triton.jit
def composite_rays_bwd_kernel(
    d_t_ptr,  # [R, S+1]
    d_w_ptr,  # [R, S]
    d_f_ptr,  # [R, S, C]
    d_background_ptr,  # [R, C]
    d_features_ptr,  # [R, C]
    d_depth_ptr,  # [R]
    d_accumulation_ptr,  # [R]
    t_ptr,  # [R, S+1]
    w_ptr,  # [R, S]
    f_ptr,  # [R, S, C]
    background_ptr,  # [R, C]
    R,
    S,
    C,
    t_stride_r,
    HAS_D_FEATURES: tl.constexpr,
    HAS_D_DEPTH: tl.constexpr,
    HAS_D_ACCUMULATION: tl.constexpr,
    HAS_F: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    LAST_SAMPLE: tl.constexpr,
    NEEDS_D_T: tl.constexpr,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_F: tl.constexpr,
    NEEDS_D_BACKGROUND: tl.constexpr,
    DEPTH: tl.constexpr,
    DENSITY: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    A: tl.constexpr = d_depth_ptr.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    t_ptrs, w_ptrs = t_ptr + (r * t_stride_r)[:, None], w_ptr + (r * S)[:, None]
    is_ray, has_samples = r < R, r < R * tl.minimum(S, 1)
    ray = is_ray[:, None]
    blocks = tl.cdiv(S, BLOCK_S)

    # the sums; and how deep each block lies, and each block one sample earlier, in registers
    block = tl.arange(0, MAX_BLOCKS)[None, :]
    depths = tl.zeros([BLOCK_R, MAX_BLOCKS], A)
    earlier_depths = tl.zeros([BLOCK_R, MAX_BLOCKS], A)
    depth = tl.zeros([BLOCK_R], A)
    earlier_depth = tl.zeros([BLOCK_R], A)
    weight = tl.zeros([BLOCK_R], A)
    moment = tl.zeros([BLOCK_R], A)
    below = tl.zeros([BLOCK_R], A)
    for b in range(blocks):
        s = b * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
        here = ray & (s < S)
        w, _ = _weigh(t_ptrs, w_ptrs, s, here, depth, DENSITY, A)
        if DEPTH == _MEDIAN:
            sums = weight[:, None] + tl.cumsum(w, 1)
            below += tl.sum((here & (sums < 0.5)).to(A), 1)
        elif DEPTH != _NONE:
            place = _place(_mid(t_ptrs, s, here, A), DEPTH, A)
            moment += tl.sum(tl.where(here, w * place, 0.0), 1)
        weight += sums_of_loaded(w)
        if DENSITY:
            depths = tl.where(block == b, depth[:, None], depths)
            depth += tl.sum(optical_depth(w_ptrs, t_ptrs, s - 1, here & (s > 0), A), 1)
            if NEEDS_D_T:
                earlier_depths = tl.where(block == b, earlier_depth[:, None], earlier_depths)
                x = optical_depth(w_ptrs, t_ptrs, s - 2, here & (s > 1), A)
                earlier_depth += tl.sum(x, 1)

    # g = products with the features + common + slope (place - mean): two products would cancel, of
    # which one may be fused
    common = tl.zeros([BLOCK_R], A)
    slope = tl.zeros([BLOCK_R], A)
    centre = tl.zeros([BLOCK_R], A)
    fixed = tl.zeros([BLOCK_R], A)
    sample = tl.zeros([BLOCK_R], tl.int32) - 1
    edge = tl.zeros([BLOCK_R], tl.int32) - 1
    if HAS_D_ACCUMULATION:
        common = load(d_accumulation_ptr + r, is_ray, A)
    if HAS_D_DEPTH and DEPTH != _NONE:
        value, mean, per_weight, sample, edge = _depth(
            weight, moment, below, t_ptr, r, has_samples, S, t_stride_r, DEPTH, A
        )
        fixed = load(d_depth_ptr + r, is_ray, A)
        if DEPTH != _MEDIAN:
            slope = fixed * per_weight
            if DEPTH == _LOG_MEAN:
                slope *= value
                mean = tl.where(weight < _LOG_MEAN_EPS, 0.0, mean)
            slope = tl.where((sample < 0) & (edge < 0), slope, 0.0)
            centre = mean
    light = 1.0 - weight
    if HAS_D_FEATURES or NEEDS_D_BACKGROUND:
        for start_c in range(0, C, BLOCK_C):
            c = start_c + tl.arange(0, BLOCK_C)
            channel = ray & (c < C)[None, :]
            d_features = tl.zeros([BLOCK_R, BLOCK_C], A)
            if HAS_D_FEATURES:
                d_features = load(d_features_ptr + (r * C)[:, None] + c[None, :], channel, A)
            behind = _behind(
                f_ptr,
                background_ptr,
                r,
                c,
                channel,
                has_samples,
                S,
                C,
                HAS_F,
                HAS_BACKGROUND,
                LAST_SAMPLE,
                A,
            )
            common -= tl.sum(d_features * behind, 1)
            if NEEDS_D_BACKGROUND:
                d_background = light[:, None] * d_features
                d_background_ptrs = d_background_ptr + (r * C)[:, None] + c[None, :]
                tl.store(d_background_ptrs, d_background, mask=channel)

    right = tl.zeros([BLOCK_R], A)
    d_t_last = tl.zeros([BLOCK_R], A)
    for i in range(blocks):
        b = blocks - 1 - i
        s = b * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
        here = ray & (s < S)
        w, passed = _weigh(t_ptrs, w_ptrs, s, here, of_block(depths, block, b), DENSITY, A)
        mid = _mid(t_ptrs, s, here, A)
        g = common[:, None] + slope[:, None] * (_place(mid, DEPTH, A) - centre[:, None])
        before = here & (s > 0)
        mid_before = _mid(t_ptrs, s - 1, before, A)
        g_before = common[:, None] + slope[:, None] * (
            _place(mid_before, DEPTH, A) - centre[:, None]
        )
        if HAS_F:
            for start_c in range(0, C, BLOCK_C):
                c = start_c + tl.arange(0, BLOCK_C)
                channel = ray & (c < C)[None, :]
                d_features = tl.zeros([BLOCK_R, BLOCK_C], A)
                if HAS_D_FEATURES:
                    d_features = load(d_features_ptr + (r * C)[:, None] + c[None, :], channel, A)
                d_sum = d_features[:, None, :]
                g += tl.sum(d_sum * _features(f_ptr, r, s, c, here, channel, S, C, A), 2)
                if NEEDS_D_T and DENSITY:
                    f = _features(f_ptr, r, s - 1, c, before, channel, S, C, A)
                    g_before += tl.sum(d_sum * f, 2)
                if NEEDS_D_F:
                    share = w
                    if LAST_SAMPLE:
                        share += tl.where(s == S - 1, light[:, None], 0.0)
                    d_f_ptrs = d_f_ptr + _feature_offsets(r, s, c, S, C)
                    mask = here[:, :, None] & channel[:, None, :]
                    tl.store(d_f_ptrs, share[:, :, None] * d_sum, mask=mask)
        from_here = tl.zeros([BLOCK_R, BLOCK_S], A)
        d_x = tl.zeros([BLOCK_R, BLOCK_S], A)
        if DENSITY:
            later = g * w
            from_here = right[:, None] + tl.cumsum(later, 1, reverse=True)
            right += tl.sum(later, 1)
            d_x = g * passed - (from_here - later)
        if NEEDS_D_W:
            d_w = g
            if DENSITY:
                d_w = d_x * (load(t_ptrs + s + 1, here, A) - load(t_ptrs + s, here, A))
            tl.store(d_w_ptr + (r * S)[:, None] + s, d_w, mask=here)
        if NEEDS_D_T:
            half = _half_d_mid(w, mid, s, slope, fixed, sample, DEPTH, A)
            earlier = of_block(earlier_depths, block, b)
            w_before, light_here = _weigh(t_ptrs, w_ptrs, s - 1, before, earlier, DENSITY, A)
            given = _half_d_mid(w_before, mid_before, s - 1, slope, fixed, sample, DEPTH, A)
            d_width = tl.zeros([BLOCK_R, BLOCK_S], A)
            if DENSITY:
                d_width = _d_width(d_x, load(w_ptrs + s, here, A), A)
                d_x_before = g_before * light_here - from_here
                given += _d_width(d_x_before, load(w_ptrs + s - 1, before, A), A)
            given = tl.where(before, given, 0.0)
            d_t = given + half - d_width
            d_t += tl.where((s == 0) & (edge == 0)[:, None], fixed[:, None], 0.0)
            tl.store(d_t_ptr + (r * t_stride_r)[:, None] + s, d_t, mask=here)
            d_t_last += tl.sum(tl.where(here & (s == S - 1), half + d_width, 0.0), 1)
    if NEEDS_D_T:
        d_t_last += tl.where(edge == S, fixed, 0.0) * tl.minimum(S, 1)
        tl.store(d_t_ptr + r * t_stride_r + S, d_t_last, mask=is_ray)


@triton.jit
def _weigh(t_ptrs, w_ptrs, s, mask, depth, DENSITY: tl.constexpr, A: tl.constexpr):
    """Weights of samples s, and the light behind them; `depth` is that of the block."""
    if DENSITY:
        x_before = optical_depth(w_ptrs, t_ptrs, s - 1, mask & (s > 0), A)
        here = depth[:, None] + tl.cumsum(x_before, 1)
        x = optical_depth(w_ptrs, t_ptrs, s, mask, A)
        return light_at(here, A) * stopped(x, A), light_at(here + x, A)
    else:
        w = load(w_ptrs + s, mask, A)
        return w, w


@triton.jit
def _mid(t_ptrs, s, mask, A: tl.constexpr):
    return 0.5 * (load(t_ptrs + s, mask, A) + load(t_ptrs + s + 1, mask, A))


@triton.jit
def _tiny(A: tl.constexpr):
    if tl.float64 == A:
        return 2.2250738585072014e-308
    else:
        return 1.1754943508222875e-38


@triton.jit
def _place(mid, DEPTH: tl.constexpr, A: tl.constexpr):
    """What the mean depth is the mean of."""
    if DEPTH == _LOG_MEAN:
        return tl.log(tl.where(mid < _tiny(A), _tiny(A), mid))
    else:
        return mid


@triton.jit
def _half_d_mid(w, mid, s, slope, fixed, sample, DEPTH: tl.constexpr, A: tl.constexpr):
    d_mid = slope[:, None] * w
    if DEPTH == _LOG_MEAN:
        small = mid < _tiny(A)
        d_mid = tl.where(small, 0.0, d_mid / tl.where(small, 1.0, mid))
    return 0.5 * (d_mid + tl.where(s == sample[:, None], fixed[:, None], 0.0))


@triton.jit
def _d_width(d_x, sigma, A: tl.constexpr):
    # a wall stays one, however thick it is
    return tl.where(is_wall(sigma, A), 0.0, d_x * sigma)


@triton.jit
def _feature_offsets(r, s, c, S, C):
    return ((r * S)[:, None] + s)[:, :, None] * C + c[None, None, :]


@triton.jit
def _features(f_ptr, r, s, c, here, channel, S, C, A: tl.constexpr):
    mask = here[:, :, None] & channel[:, None, :]
    return load(f_ptr + _feature_offsets(r, s, c, S, C), mask, A)


@triton.jit
def _behind(
    f_ptr,
    background_ptr,
    r,
    c,
    channel,
    has_samples,
    S,
    C,
    HAS_F: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    LAST_SAMPLE: tl.constexpr,
    A: tl.constexpr,
):
    """What stands behind the samples of each ray."""
    if HAS_F and LAST_SAMPLE:
        last = f_ptr + (r * S + S - 1)[:, None] * C + c[None, :]
        return load(last, channel & has_samples[:, None], A)
    elif HAS_BACKGROUND:
        return load(background_ptr + (r * C)[:, None] + c[None, :], channel, A)
    else:
        return tl.zeros([r.shape[0], c.shape[0]], A)


@triton.jit
def _depth(
    weight,
    moment,
    below,
    t_ptr,
    r,
    has_samples,
    S,
    t_stride_r,
    DEPTH: tl.constexpr,
    A: tl.constexpr,
):
    """Depth, mean, 1 / weight, and the sample or edge that alone decides, or -1."""
    sample = tl.zeros(weight.shape, tl.int32) - 1
    edge = tl.zeros(weight.shape, tl.int32) - 1
    t_ptrs = t_ptr + r * t_stride_r
    zero = weight * 0.0
    if DEPTH == _NONE:
        return zero, zero, zero, sample, edge
    elif DEPTH == _MEDIAN:
        sample = tl.minimum(below.to(tl.int32), S - 1)
        return _mid(t_ptrs, sample, has_samples, A), zero, zero, sample, edge
    else:
        if DEPTH == _EXPECTED:
            per_weight = 1.0 / (weight + _EXPECTED_EPS)
            mean = moment / (weight + _EXPECTED_EPS)
            value = mean
            least, most = _mid(t_ptrs, 0, has_samples, A), _mid(t_ptrs, S - 1, has_samples, A)
            sample = tl.where(value < least, 0, tl.where(value > most, S - 1, sample))
        else:
            thick = tl.where(weight < _LOG_MEAN_EPS, _LOG_MEAN_EPS, weight)
            per_weight = 1.0 / thick
            mean = moment / thick
            value = tl.exp(mean)
            least, most = load(t_ptrs, has_samples, A), load(t_ptrs + S, has_samples, A)
            edge = tl.where(value < least, 0, tl.where(value > most, S, edge))
        value = tl.where(value < least, least, tl.where(value > most, most, value))
        return value, mean, per_weight, sample, edge


def _shapes(
    w: Tensor, f: Tensor | None, background: Tensor | None
) -> tuple[int, tuple[int, ...], int]:
    """The number of samples, the rays and the number of channels."""
    sized = f if f is not None else background
    return w.shape[-1], w.shape[:-1], 0 if sized is None else sized.shape[-1]


def _launch(t: Tensor, S: int, C: int) -> tuple[int, tuple[int], dict[str, object]]:
    R = t.numel() // (S + 1)
    grid, tile = launch(R, S, t.dtype)
    return R, grid, {**tile, "BLOCK_C": min(triton.next_power_of_2(max(C, 1)), _MAX_CHANNELS)}


def fwd(
    t: Tensor,
    w: Tensor,
    f: Tensor | None,
    background: Tensor | None,
    depth_kind: int,
    density: bool,
    last_sample: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    S, rays, C = _shapes(w, f, background)
    R, grid, tile = _launch(t, S, C)
    depth = t.new_empty(rays, dtype=accumulator(t.dtype))
    accumulation, features = depth.new_empty(rays), depth.new_empty((*rays, C))
    composite_rays_fwd_kernel[grid](
        features,
        depth,
        accumulation,
        t,
        w,
        t if f is None else f,
        t if background is None else background,
        R,
        S,
        C,
        S + 1,
        HAS_F=f is not None,
        HAS_BACKGROUND=background is not None,
        LAST_SAMPLE=last_sample,
        DEPTH=depth_kind,
        DENSITY=density,
        **tile,
    )
    return features, depth, accumulation


def bwd(
    d_features: Tensor | None,
    d_depth: Tensor | None,
    d_accumulation: Tensor | None,
    t: Tensor,
    w: Tensor,
    f: Tensor | None,
    background: Tensor | None,
    depth_kind: int,
    density: bool,
    last_sample: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S, _, C = _shapes(w, f, background)
    R, grid, tile = _launch(t, S, C)
    # these spilled 8 bytes: of many channels for 96 registers (sm_90), of few for 168 (sm_100)
    registers = 104 if tile["BLOCK_C"] == _MAX_CHANNELS else 184
    absent = t.new_empty(0, dtype=accumulator(t.dtype))
    grads = [
        t.new_empty(0) if x is None else empty_gradient(x, needs, i)
        for i, x in enumerate((t, w, f, background))
    ]
    composite_rays_bwd_kernel[grid](
        *grads,
        absent if d_features is None else d_features,
        absent if d_depth is None else d_depth,
        absent if d_accumulation is None else d_accumulation,
        t,
        w,
        t if f is None else f,
        t if background is None else background,
        R,
        S,
        C,
        S + 1,
        HAS_D_FEATURES=d_features is not None,
        HAS_D_DEPTH=d_depth is not None,
        HAS_D_ACCUMULATION=d_accumulation is not None,
        HAS_F=f is not None,
        HAS_BACKGROUND=background is not None,
        LAST_SAMPLE=last_sample,
        NEEDS_D_T=bool(needs & 1),
        NEEDS_D_W=bool(needs & 2),
        NEEDS_D_F=f is not None and bool(needs & 4),
        NEEDS_D_BACKGROUND=background is not None and bool(needs & 8),
        DEPTH=depth_kind,
        DENSITY=density,
        MAX_BLOCKS=triton.next_power_of_2(max(triton.cdiv(S, tile["BLOCK_S"]), 1)),
        **tile,
        **(bounded(registers, t) if t.dtype == torch.bfloat16 else {}),
    )
    return tuple(grads)
