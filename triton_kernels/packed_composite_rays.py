# Compositing of packed rays, the formulas of csrc/cpu/packed_composite_rays.cpp: features =
# sum_i w_i f_i + (1 - sum_i w_i) background, g_i = d_features . (f_i - background) + d_accumulation
# + d_depth (s_i - depth) / sum_i w_i, d_f_i = w_i d_features; w given or from densities.
# A program owns BLOCK_R rays and takes BLOCK_S samples of each, and BLOCK_C channels, at a time,
# then the long ones among them by themselves. Forward: once over f, and over t and w for each
# BLOCK_C. Backward: t and w from the left for the sums, then everything from the right. Shifted and
# second loads hit the L1 cache. docs/compositing.md
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    accumulator,
    add_exactly,
    bounded,
    empty_gradient,
    is_wall,
    launch_packed,
    light_at,
    load,
    packed_rays,
    packed_values,
    stopped,
)
from .composite_rays import (
    _EXPECTED,
    _EXPECTED_EPS,
    _LOG_MEAN,
    _LOG_MEAN_EPS,
    _MAX_CHANNELS,
    _MEDIAN,
    _NONE,
    _d_width,
    _half_d_mid,
    _place,
)


@triton.jit
def packed_composite_rays_fwd_kernel(
    features_ptr,  # [R, C]
    depth_ptr,  # [R]
    accumulation_ptr,  # [R]
    t_starts_ptr,  # [P]
    t_ends_ptr,  # [P]
    w_ptr,  # [P]
    offsets_ptr,  # [R+1]
    f_ptr,  # [P, C]
    background_ptr,  # [R, C]
    R,
    P,
    C,
    HAS_F: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    LAST_SAMPLE: tl.constexpr,
    DEPTH: tl.constexpr,
    DENSITY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    short = n <= BLOCK_LONG
    _composite(
        features_ptr, depth_ptr, accumulation_ptr, t_starts_ptr, t_ends_ptr, w_ptr, f_ptr,
        background_ptr, r, (r < R) & short, begin, tl.where(short, n, 0), C, HAS_F, HAS_BACKGROUND,
        LAST_SAMPLE, DEPTH, DENSITY, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, n_one = packed_rays(offsets_ptr, one, R, P)
            n_one = tl.where((n_one > BLOCK_LONG) & (one < R), n_one, 0)
            _composite(
                features_ptr, depth_ptr, accumulation_ptr, t_starts_ptr, t_ends_ptr, w_ptr, f_ptr,
                background_ptr, one, n_one > 0, begin_one, n_one, C, HAS_F, HAS_BACKGROUND,
                LAST_SAMPLE, DEPTH, DENSITY, BLOCK_LONG, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _composite(
    features_ptr,
    depth_ptr,
    accumulation_ptr,
    t_starts_ptr,
    t_ends_ptr,
    w_ptr,
    f_ptr,
    background_ptr,
    r,
    is_ray,
    begin,
    n,
    C,
    HAS_F: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    LAST_SAMPLE: tl.constexpr,
    DEPTH: tl.constexpr,
    DENSITY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    A: tl.constexpr = depth_ptr.dtype.element_ty
    for start_c in range(0, tl.maximum(C, 1), BLOCK_C):
        c = start_c + tl.arange(0, BLOCK_C)
        channel = is_ray[:, None] & (c < C)[None, :]
        features = tl.zeros([n.shape[0], BLOCK_C], A)
        optical = tl.zeros(n.shape, A)
        optical_lost = tl.zeros(n.shape, A)
        weight = tl.zeros(n.shape, A)
        weight_lost = tl.zeros(n.shape, A)
        moment = tl.zeros(n.shape, A)
        below = tl.zeros(n.shape, A)
        for b in range(tl.cdiv(tl.max(n, 0), BLOCK)):
            s = tl.cast(b, tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
            k, here = begin[:, None] + s, s < n[:, None]
            w, _, x_before = _weigh(
                t_starts_ptr, t_ends_ptr, w_ptr, k, s, here, optical, DENSITY, A
            )
            if HAS_F:
                f = load(
                    f_ptr + _feature_offsets(k, c, C), here[:, :, None] & channel[:, None, :], A
                )
                features += tl.sum(w[:, :, None] * f, 1)
            if DEPTH == _MEDIAN:
                sums = weight[:, None] + tl.cumsum(w, 1)
                below += tl.sum((here & (sums < 0.5)).to(A), 1)
            elif DEPTH != _NONE:
                place = _place(_mid(t_starts_ptr, t_ends_ptr, k, here, A), DEPTH, A)
                moment += tl.sum(tl.where(here, w * place, 0.0), 1)
            weight, weight_lost = add_exactly(weight, weight_lost, tl.sum(w, 1))
            optical, optical_lost = add_exactly(optical, optical_lost, tl.sum(x_before, 1))
        behind = _behind(
            f_ptr, background_ptr, r, c, channel, begin, n, C, HAS_F, HAS_BACKGROUND, LAST_SAMPLE, A
        )
        features += (1.0 - weight)[:, None] * behind
        tl.store(features_ptr + (r * C)[:, None] + c[None, :], features, mask=channel)
        if start_c == 0:
            value, _, _, _, _ = _depth(
                weight, moment, below, t_starts_ptr, t_ends_ptr, begin, n, DEPTH, A
            )
            tl.store(depth_ptr + r, value, mask=is_ray)
            tl.store(accumulation_ptr + r, weight, mask=is_ray)


@triton.jit
def packed_composite_rays_bwd_kernel(
    d_t_starts_ptr,  # [P]
    d_t_ends_ptr,  # [P]
    d_w_ptr,  # [P]
    d_f_ptr,  # [P, C]
    d_background_ptr,  # [R, C]
    kept_ptr,  # [P // BLOCK_S + 1]
    d_features_ptr,  # [R, C]
    d_depth_ptr,  # [R]
    d_accumulation_ptr,  # [R]
    t_starts_ptr,  # [P]
    t_ends_ptr,  # [P]
    w_ptr,  # [P]
    offsets_ptr,  # [R+1]
    f_ptr,  # [P, C]
    background_ptr,  # [R, C]
    R,
    P,
    C,
    HAS_D_FEATURES: tl.constexpr,
    HAS_D_DEPTH: tl.constexpr,
    HAS_D_ACCUMULATION: tl.constexpr,
    HAS_F: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    LAST_SAMPLE: tl.constexpr,
    NEEDS_D_T_STARTS: tl.constexpr,
    NEEDS_D_T_ENDS: tl.constexpr,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_F: tl.constexpr,
    NEEDS_D_BACKGROUND: tl.constexpr,
    DEPTH: tl.constexpr,
    DENSITY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LONG: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # one ray less: the samples before offsets[0]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R - 1
    r = first + tl.arange(0, BLOCK_R)
    begin, n = packed_rays(offsets_ptr, r, R, P)
    short = n <= BLOCK_LONG
    is_ray = (r >= 0) & (r < R) & short
    _gradients(
        d_t_starts_ptr, d_t_ends_ptr, d_w_ptr, d_f_ptr, d_background_ptr, kept_ptr, d_features_ptr,
        d_depth_ptr, d_accumulation_ptr, t_starts_ptr, t_ends_ptr, w_ptr, f_ptr, background_ptr, r,
        is_ray, begin, tl.where(short, n, 0), R, C, HAS_D_FEATURES, HAS_D_DEPTH, HAS_D_ACCUMULATION,
        HAS_F, HAS_BACKGROUND, LAST_SAMPLE, NEEDS_D_T_STARTS, NEEDS_D_T_ENDS, NEEDS_D_W, NEEDS_D_F,
        NEEDS_D_BACKGROUND, DEPTH, DENSITY, BLOCK_S, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    if tl.max(n, 0) > BLOCK_LONG:
        for i in range(BLOCK_R):
            one = first + i + tl.arange(0, 1)
            begin_one, n_one = packed_rays(offsets_ptr, one, R, P)
            n_one = tl.where(n_one > BLOCK_LONG, n_one, 0)
            is_one = (one >= 0) & (one < R) & (n_one > 0)
            _gradients(
                d_t_starts_ptr, d_t_ends_ptr, d_w_ptr, d_f_ptr, d_background_ptr, kept_ptr,
                d_features_ptr, d_depth_ptr, d_accumulation_ptr, t_starts_ptr, t_ends_ptr, w_ptr,
                f_ptr, background_ptr, one, is_one, begin_one, n_one, R, C, HAS_D_FEATURES,
                HAS_D_DEPTH, HAS_D_ACCUMULATION, HAS_F, HAS_BACKGROUND, LAST_SAMPLE,
                NEEDS_D_T_STARTS, NEEDS_D_T_ENDS, NEEDS_D_W, NEEDS_D_F, NEEDS_D_BACKGROUND, DEPTH,
                DENSITY, BLOCK_S, BLOCK_LONG, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _gradients(
    d_t_starts_ptr,
    d_t_ends_ptr,
    d_w_ptr,
    d_f_ptr,
    d_background_ptr,
    kept_ptr,
    d_features_ptr,
    d_depth_ptr,
    d_accumulation_ptr,
    t_starts_ptr,
    t_ends_ptr,
    w_ptr,
    f_ptr,
    background_ptr,
    r,
    is_ray,
    begin,
    n,
    R,
    C,
    HAS_D_FEATURES: tl.constexpr,
    HAS_D_DEPTH: tl.constexpr,
    HAS_D_ACCUMULATION: tl.constexpr,
    HAS_F: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    LAST_SAMPLE: tl.constexpr,
    NEEDS_D_T_STARTS: tl.constexpr,
    NEEDS_D_T_ENDS: tl.constexpr,
    NEEDS_D_W: tl.constexpr,
    NEEDS_D_F: tl.constexpr,
    NEEDS_D_BACKGROUND: tl.constexpr,
    DEPTH: tl.constexpr,
    DENSITY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    A: tl.constexpr = kept_ptr.dtype.element_ty
    # how deep each block but a ray's first lies; rays have room for it where they begin
    room = begin // BLOCK_S - 1
    blocks = tl.cdiv(tl.max(n, 0), BLOCK)
    optical = tl.zeros(n.shape, A)
    optical_lost = tl.zeros(n.shape, A)
    weight = tl.zeros(n.shape, A)
    weight_lost = tl.zeros(n.shape, A)
    moment = tl.zeros(n.shape, A)
    below = tl.zeros(n.shape, A)
    for i in range(blocks):
        b = tl.cast(i, tl.int64)
        s = b * BLOCK + tl.arange(0, BLOCK)[None, :]
        k, here = begin[:, None] + s, s < n[:, None]
        if DENSITY:
            # not the first block, and one that exists
            tl.store(kept_ptr + room + b, optical, mask=tl.minimum(b, n - b * BLOCK) > 0)
        w, _, x_before = _weigh(t_starts_ptr, t_ends_ptr, w_ptr, k, s, here, optical, DENSITY, A)
        if DEPTH == _MEDIAN:
            sums = weight[:, None] + tl.cumsum(w, 1)
            below += tl.sum((here & (sums < 0.5)).to(A), 1)
        elif DEPTH != _NONE:
            place = _place(_mid(t_starts_ptr, t_ends_ptr, k, here, A), DEPTH, A)
            moment += tl.sum(tl.where(here, w * place, 0.0), 1)
        weight, weight_lost = add_exactly(weight, weight_lost, tl.sum(w, 1))
        optical, optical_lost = add_exactly(optical, optical_lost, tl.sum(x_before, 1))
    # other threads read what is kept
    tl.debug_barrier()

    # g = products with the features + common + slope (place - mean): two products would cancel, of
    # which one may be fused
    common = tl.zeros(n.shape, A)
    slope = tl.zeros(n.shape, A)
    centre = tl.zeros(n.shape, A)
    fixed = tl.zeros(n.shape, A)
    sample = tl.zeros(n.shape, tl.int64) - 1
    edge = tl.zeros(n.shape, tl.int64) - 1
    if HAS_D_ACCUMULATION:
        common = packed_values(d_accumulation_ptr, r, R)
    if HAS_D_DEPTH and DEPTH != _NONE:
        value, mean, per_weight, sample, edge = _depth(
            weight, moment, below, t_starts_ptr, t_ends_ptr, begin, n, DEPTH, A
        )
        fixed = packed_values(d_depth_ptr, r, R)
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
            channel = is_ray[:, None] & (c < C)[None, :]
            d_features = tl.zeros([n.shape[0], BLOCK_C], A)
            if HAS_D_FEATURES:
                d_features_ptrs = d_features_ptr + (r * C)[:, None] + c[None, :]
                d_features = _load_of_rays(d_features_ptrs, channel, A)
            behind = _behind(
                f_ptr, background_ptr, r, c, channel, begin, n, C, HAS_F, HAS_BACKGROUND,
                LAST_SAMPLE, A,
            )  # fmt: skip
            common -= tl.sum(d_features * behind, 1)
            if NEEDS_D_BACKGROUND:
                d_background_ptrs = d_background_ptr + (r * C)[:, None] + c[None, :]
                tl.store(d_background_ptrs, light[:, None] * d_features, mask=channel)

    right = tl.zeros(n.shape, A)
    right_lost = tl.zeros(n.shape, A)
    for i in range(blocks):
        b = blocks - 1 - tl.cast(i, tl.int64)
        s = b * BLOCK + tl.arange(0, BLOCK)[None, :]
        k, here = begin[:, None] + s, s < n[:, None]
        if DENSITY:
            kept = tl.minimum(b, n - b * BLOCK) > 0
            optical = tl.where(kept, tl.load(kept_ptr + tl.where(kept, room + b, 0)), 0.0)
        w, passed, _ = _weigh(t_starts_ptr, t_ends_ptr, w_ptr, k, s, here, optical, DENSITY, A)
        mid = tl.zeros(here.shape, A)
        if DEPTH != _MEDIAN and DEPTH != _NONE:
            mid = _mid(t_starts_ptr, t_ends_ptr, k, here, A)
        g = common[:, None] + slope[:, None] * (_place(mid, DEPTH, A) - centre[:, None])
        if HAS_F:
            for start_c in range(0, C, BLOCK_C):
                c = start_c + tl.arange(0, BLOCK_C)
                in_c = (c < C)[None, :]
                d_features = tl.zeros([n.shape[0], BLOCK_C], A)
                if HAS_D_FEATURES:
                    d_features_ptrs = d_features_ptr + (r * C)[:, None] + c[None, :]
                    d_features = _load_of_rays(d_features_ptrs, is_ray[:, None] & in_c, A)
                d_sum = d_features[:, None, :]
                mask, at = here[:, :, None] & in_c[:, None, :], _feature_offsets(k, c, C)
                g += tl.sum(d_sum * load(f_ptr + at, mask, A), 2)
                if NEEDS_D_F:
                    share = w
                    if LAST_SAMPLE:
                        share += tl.where(s == n[:, None] - 1, light[:, None], 0.0)
                    tl.store(d_f_ptr + at, share[:, :, None] * d_sum, mask=mask)
        d_w = g
        d_width = tl.zeros(here.shape, A)
        if DENSITY:
            sigma, width = _density(t_starts_ptr, t_ends_ptr, w_ptr, k, here, A)
            later = tl.where(here, g * w, 0.0)
            from_here = right[:, None] + tl.cumsum(later, 1, reverse=True)
            right, right_lost = add_exactly(right, right_lost, tl.sum(later, 1))
            d_x = g * passed - (from_here - later)
            d_w = d_x * width
            d_width = _d_width(d_x, sigma, A)
        if NEEDS_D_W:
            tl.store(d_w_ptr + k, d_w, mask=here)
        half = _half_d_mid(w, mid, s, slope, fixed, sample, DEPTH, A)
        if NEEDS_D_T_STARTS:
            at_edge = (s == 0) & (edge == 0)[:, None]
            d_t_starts = half - d_width + tl.where(at_edge, fixed[:, None], 0.0)
            tl.store(d_t_starts_ptr + k, d_t_starts, mask=here)
        if NEEDS_D_T_ENDS:
            at_edge = (s == n[:, None] - 1) & (edge == n)[:, None]
            d_t_ends = half + d_width + tl.where(at_edge, fixed[:, None], 0.0)
            tl.store(d_t_ends_ptr + k, d_t_ends, mask=here)


@triton.jit
def _density(t_starts_ptr, t_ends_ptr, w_ptr, k, mask, A: tl.constexpr):
    width = load(t_ends_ptr + k, mask, A) - load(t_starts_ptr + k, mask, A)
    return load(w_ptr + k, mask, A), width


@triton.jit
def _optical_depth(t_starts_ptr, t_ends_ptr, w_ptr, k, mask, A: tl.constexpr):
    # whatever is as deep lets no light through, and infinite sums would cancel to NaN
    DARK: tl.constexpr = 1500.0 if tl.float64 == A else 190.0
    sigma, width = _density(t_starts_ptr, t_ends_ptr, w_ptr, k, mask, A)
    # a wall without width is nothing
    nothing = is_wall(sigma, A) & (width == 0)
    x = tl.where(nothing, 0.0, tl.where(nothing, 0.0, sigma) * width)
    return tl.where(x > DARK, DARK, x)


@triton.jit
def _weigh(
    t_starts_ptr, t_ends_ptr, w_ptr, k, s, here, optical, DENSITY: tl.constexpr, A: tl.constexpr
):
    """Weights of samples s, the light behind them, and the depths of those one before; `optical` is
    how deep the block lies."""
    if DENSITY:
        before = here & (s > 0)
        x_before = _optical_depth(t_starts_ptr, t_ends_ptr, w_ptr, k - 1, before, A)
        depth = optical[:, None] + tl.cumsum(x_before, 1)
        x = _optical_depth(t_starts_ptr, t_ends_ptr, w_ptr, k, here, A)
        return light_at(depth, A) * stopped(x, A), light_at(depth + x, A), x_before
    else:
        w = load(w_ptr + k, here, A)
        return w, w, w


@triton.jit
def _mid(t_starts_ptr, t_ends_ptr, k, mask, A: tl.constexpr):
    return 0.5 * (load(t_starts_ptr + k, mask, A) + load(t_ends_ptr + k, mask, A))


@triton.jit
def _load_of_rays(ptrs, mask, A: tl.constexpr):
    """`load` of as little as one value: there the interpreter takes `other=0.0` for none."""
    return tl.where(mask, tl.load(ptrs, mask=mask, other=1.0).to(A), 0.0)


@triton.jit
def _mid_of_rays(t_starts_ptr, t_ends_ptr, k, mask, A: tl.constexpr):
    start, end = _load_of_rays(t_starts_ptr + k, mask, A), _load_of_rays(t_ends_ptr + k, mask, A)
    return 0.5 * (start + end)


@triton.jit
def _feature_offsets(k, c, C):
    return k[:, :, None] * C + c[None, None, :]


@triton.jit
def _behind(
    f_ptr,
    background_ptr,
    r,
    c,
    channel,
    begin,
    n,
    C,
    HAS_F: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    LAST_SAMPLE: tl.constexpr,
    A: tl.constexpr,
):
    """What stands behind the samples of each ray."""
    if HAS_F and LAST_SAMPLE:
        last = f_ptr + ((begin + n - 1) * C)[:, None] + c[None, :]
        return _load_of_rays(last, channel & (n > 0)[:, None], A)
    elif HAS_BACKGROUND:
        return _load_of_rays(background_ptr + (r * C)[:, None] + c[None, :], channel, A)
    else:
        return tl.zeros([r.shape[0], c.shape[0]], A)


@triton.jit
def _depth(
    weight, moment, below, t_starts_ptr, t_ends_ptr, begin, n, DEPTH: tl.constexpr, A: tl.constexpr
):
    """Depth, mean, 1 / weight, and the sample, or the edge of n + 1, that alone decides, or -1."""
    sample = tl.zeros(weight.shape, tl.int64) - 1
    edge = tl.zeros(weight.shape, tl.int64) - 1
    has_samples, last = n > 0, n - 1
    zero = weight * 0.0
    if DEPTH == _NONE:
        return zero, zero, zero, sample, edge
    elif DEPTH == _MEDIAN:
        sample = tl.minimum(below.to(tl.int64), last)
        value = _mid_of_rays(t_starts_ptr, t_ends_ptr, begin + sample, has_samples, A)
        return value, zero, zero, sample, edge
    else:
        if DEPTH == _EXPECTED:
            per_weight = 1.0 / (weight + _EXPECTED_EPS)
            mean = moment / (weight + _EXPECTED_EPS)
            value = mean
            least = _mid_of_rays(t_starts_ptr, t_ends_ptr, begin, has_samples, A)
            most = _mid_of_rays(t_starts_ptr, t_ends_ptr, begin + last, has_samples, A)
            sample = tl.where(value < least, 0, tl.where(value > most, last, sample))
        else:
            thick = tl.where(weight < _LOG_MEAN_EPS, _LOG_MEAN_EPS, weight)
            per_weight = 1.0 / thick
            mean = moment / thick
            value = tl.exp(mean)
            least = _load_of_rays(t_starts_ptr + begin, has_samples, A)
            most = _load_of_rays(t_ends_ptr + begin + last, has_samples, A)
            edge = tl.where(value < least, 0, tl.where(value > most, n, edge))
        value = tl.where(value < least, least, tl.where(value > most, most, value))
        return value, mean, per_weight, sample, edge


def _launch(
    R: int, w: Tensor, f: Tensor | None, background: Tensor | None
) -> tuple[int, tuple[int], dict[str, object]]:
    """The number of channels, the grid for R rays, and the tile."""
    sized = f if f is not None else background
    C = 0 if sized is None else sized.shape[-1]
    grid, tile = launch_packed(R, len(w), w.dtype)
    # 4 samples a thread, each with its channels; 8 spilled 128 bytes backward (sm_90, C = 3)
    tile["BLOCK_LONG"] //= 2
    # half as many in fp64, which with 8 took 168 registers backward and spilled 24 bytes (sm_80)
    most = _MAX_CHANNELS // (accumulator(w.dtype).itemsize // 4)
    block_c = min(triton.next_power_of_2(max(C, 1)), most)
    # unbound, halves spilled 16 bytes forward, and took 146 registers backward; doubles spilled 8
    # bytes backward for 128 registers (sm_90)
    registers = {2: 128, 8: 144}.get(w.dtype.itemsize) if block_c == most else None
    return C, grid, {**tile, "BLOCK_C": block_c, **(bounded(registers, w) if registers else {})}


def fwd(
    t_starts: Tensor,
    t_ends: Tensor,
    w: Tensor,
    offsets: Tensor,
    f: Tensor | None,
    background: Tensor | None,
    depth_kind: int,
    density: bool,
    last_sample: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    R = len(offsets) - 1
    C, grid, tile = _launch(R, w, f, background)
    depth = w.new_empty(R, dtype=accumulator(w.dtype))
    accumulation, features = depth.new_empty(R), depth.new_empty(R, C)
    packed_composite_rays_fwd_kernel[grid](
        features,
        depth,
        accumulation,
        t_starts,
        t_ends,
        w,
        offsets,
        w if f is None else f,
        w if background is None else background,
        R,
        len(w),
        C,
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
    t_starts: Tensor,
    t_ends: Tensor,
    w: Tensor,
    offsets: Tensor,
    f: Tensor | None,
    background: Tensor | None,
    depth_kind: int,
    density: bool,
    last_sample: bool,
    needs: int,
) -> tuple[Tensor, ...]:
    R, P = len(offsets) - 1, len(w)
    grads = tuple(
        w.new_empty(0) if x is None else empty_gradient(x, needs, i)
        for i, x in enumerate((t_starts, t_ends, w, f, background))
    )
    if R == 0:
        return tuple(grad.zero_() for grad in grads)
    C, grid, tile = _launch(R + 2, w, f, background)
    absent = w.new_empty(0, dtype=accumulator(w.dtype))
    packed_composite_rays_bwd_kernel[grid](
        *grads,
        absent.new_empty(P // tile["BLOCK_S"] + 1),
        absent if d_features is None else d_features,
        absent if d_depth is None else d_depth,
        absent if d_accumulation is None else d_accumulation,
        t_starts,
        t_ends,
        w,
        offsets,
        w if f is None else f,
        w if background is None else background,
        R,
        P,
        C,
        HAS_D_FEATURES=d_features is not None,
        HAS_D_DEPTH=d_depth is not None,
        HAS_D_ACCUMULATION=d_accumulation is not None,
        HAS_F=f is not None,
        HAS_BACKGROUND=background is not None,
        LAST_SAMPLE=last_sample,
        NEEDS_D_T_STARTS=bool(needs & 1),
        NEEDS_D_T_ENDS=bool(needs & 2),
        NEEDS_D_W=bool(needs & 4),
        NEEDS_D_F=f is not None and bool(needs & 8),
        NEEDS_D_BACKGROUND=background is not None and bool(needs & 16),
        DEPTH=depth_kind,
        DENSITY=density,
        **tile,
    )
    return grads
