from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..domain import Domain, real, unit
from ..op import HALVES, Op, op

__all__ = ["TileComposite", "composite_tiles"]

# constants of those who defined the algorithm: gsplat's release 1.5.3 and its head, and the
# rasteriser of Kerbl et al.
TILE_PRESETS: dict[str, dict[str, Any]] = {
    "gsplat15": dict(max_alpha=0.999, pixel_center=0.5, stop_at_min=True),
    "gsplat": dict(max_alpha=0.99, pixel_center=0.5, stop_at_min=True),
    "inria": dict(max_alpha=0.99, pixel_center=0.0, stop_at_min=False),
}
# the least alpha that is drawn, in 8 bits of colour
LEAST_ALPHA = 1 / 255
# a block of threads holds a tile, and a row of it a register or two
_TILE_MOST = 16

_tile_starts = Domain(
    "rise from 0 to the length of flatten_ids",
    lambda x, M: (
        (x <= torch.arange(x.numel(), device=x.device).view(x.shape).clamp(max=1) * M)
        & (x >= torch.cat([x.new_zeros(1), x.flatten()])[: x.numel()].view(x.shape))
    ),
    lambda u, M: ((u.flatten().cumsum(0) - u.flatten()) / max(u.sum(), 1) * M).long().view(u.shape),
    "M",
)
_splats = Domain(
    "be indices of splats",
    lambda x, P: (x >= 0) & (x < P),
    lambda u, P: (u * P).long(),
    "P",
)
_booleans = Domain(
    "be 0 or 1", lambda x, _: (x == 0) | (x == 1), lambda u, _: (u < 0.75).long(), "I"
)
_alpha = Domain("be > 0 and <= 1", lambda x: (x > 0) & (x <= 1), lambda u: u)


class TileComposite(NamedTuple):
    """What `composite_tiles` returns."""

    colors: Tensor  # [..., H, W, D]
    alpha: Tensor  # [..., H, W]
    depth: Tensor  # [..., H, W]
    median_depth: Tensor  # [..., H, W]


class _WithAbsolute(torch.autograd.Function):
    """x [tiles, pixels, splats]; its gradient also goes to [tiles, splats], summed over pixels as
    absolute values."""

    @staticmethod
    def forward(x: Tensor, absolute: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, Tensor]:
        return d_x, d_x.abs().sum(1)


class TileOp(Op):
    """An op on lists of splats per tile: the splats of all images lie end to end, and the size of
    the images is a pair of scalars."""

    def bind(self, args: Sequence[Any]) -> tuple[tuple[int, ...], dict[str, int]]:
        leading, sizes = super().bind(args)
        scalars = dict(zip(self.domain, args, strict=True))
        return leading, {**sizes, "H": scalars["image_height"], "W": scalars["image_width"]}

    def check(self, args: Sequence[Any]) -> None:
        super().check(args)
        named = dict(zip(self.domain, args, strict=True))
        height, width, size = (named[x] for x in ("image_height", "image_width", "tile_size"))
        for name, value in (("image_height", height), ("image_width", width)):
            if value < 1:
                self._fail(ValueError, name, "be >= 1", value)
        if not 1 <= size <= _TILE_MOST:
            self._fail(ValueError, "tile_size", f"be from 1 to {_TILE_MOST}", size)
        offsets, background = named["tile_offsets"], named["background"]
        tiles = [-(-height // size), -(-width // size)]
        if [*offsets.shape[1:]] != tiles:
            rule = f"have shape [..., {tiles[0]}, {tiles[1]}]"
            self._fail(ValueError, "tile_offsets", rule, [*offsets.shape])
        images = len(offsets)
        if background is not None and len(background) not in (images, images * height * width):
            rule = f"have shape [{images}, D] or [{images * height * width}, D]"
            self._fail(ValueError, "background", rule, [*background.shape])

    def _check_dtype(self, name: str, dtype: torch.dtype, first: str, want: torch.dtype) -> None:
        if want in HALVES:
            self._fail(TypeError, first, "be float32 or float64", str(want).removeprefix("torch."))
        super()._check_dtype(name, dtype, first, want)

    def _reference(self, *args: Any) -> Any:
        # on the CPU kernels look at the lists as well, as it costs no synchronisation
        if args[0].device.type == "cpu":
            self.check_integers(args[: len(self.inputs)])
        return super()._reference(*args)

    def _positional(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        preset = named.get("preset", "gsplat15")
        if preset not in TILE_PRESETS:
            self._fail(ValueError, "preset", f"be one of {', '.join(TILE_PRESETS)}", repr(preset))
        named = {**TILE_PRESETS[preset], **{k: x for k, x in named.items() if k != "preset"}}
        given = super()._positional(args, named)
        return tuple(self._flat(dict(zip(self.domain, given, strict=True))).values())

    def raw_arguments(self, tensors: Sequence[Tensor | None], **named: Any) -> tuple[Any, ...]:
        values = {**self._keywords, **dict(zip(self.inputs, tensors, strict=True)), **named}
        return self._encoded(tuple(self._flat({x: values[x] for x in self.domain}).values()))

    def _flat(self, values: dict[str, Any]) -> dict[str, Any]:
        """The images end to end, as the raw ops take them; integers of 64 bits, and all but what
        may be narrow of 32 at least."""
        means2d, offsets = values["means2d"], values["tile_offsets"]
        if not (isinstance(means2d, Tensor) and isinstance(offsets, Tensor)):
            return values
        splats, images = tuple(means2d.shape[:-1]), tuple(offsets.shape[:-2])
        pixels = (*images, values["image_height"], values["image_width"])
        flat = {**values}
        for array in self.signature.inputs:
            x = values[array.name]
            if not isinstance(x, Tensor):
                continue
            if array.name == "background" and x.dim() == 1:
                x = x.expand(*images, *x.shape)
            # no sets: a hash would make torch.compile take sizes for constants
            inner, leads = len(array.dims) - 1, [splats]
            if array.name in ("tile_offsets", "masks"):
                inner, leads = 2, [images]
            elif array.name == "background":
                leads = [images, pixels]
            lead = tuple(x.shape[: x.dim() - inner])
            # one that does not fit is left for the check
            if array.name != "flatten_ids" and lead in leads:
                x = x.flatten(0, len(lead) - 1) if lead else x[None]
            if array.name in self.integer:
                x = x.long() if x.dtype in (torch.int32, torch.bool) else x
            elif array.name not in self.narrow and x.dtype in HALVES and means2d.dtype == x.dtype:
                x = x.float()
            flat[array.name] = x
        return flat

    def public(self) -> Callable:
        call = super().public()

        @functools.wraps(call)
        def composite_tiles(*args: Any, **named: Any) -> TileComposite:
            outputs = call(*args, **named)
            offsets = named["tile_offsets"] if "tile_offsets" in named else args[4]
            images = offsets.shape[:-2]
            return TileComposite(*(x.reshape(*images, *x.shape[1:]) for x in outputs))

        return composite_tiles

    def sample(
        self,
        leading: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **sizes: int,
    ) -> list[Tensor]:
        """Random inputs: N splats of each image, three of four of them in the list of each tile."""
        images, N = leading[0] if leading else 1, sizes["N"]
        tiles = images, sizes["Y"], sizes["X"]
        generator = torch.Generator().manual_seed(seed)
        listed = torch.rand(*tiles, N, generator=generator) < 0.75
        sizes = {**sizes, "I": images, "P": images * N, "M": int(listed.sum()), "B": images}
        values = super().sample((), dtype, seed, **sizes)
        named = dict(zip(self.inputs, values, strict=True))
        first = torch.arange(images)[:, None, None, None] * N
        lengths = listed.sum(-1).flatten()
        named["flatten_ids"] = (first + torch.arange(N)).expand(*tiles, N)[listed]
        named["tile_offsets"] = (lengths.cumsum(0) - lengths).view(tiles)
        # splats two pixels wide, more or less, around an area of 8 pixels a tile
        u = torch.rand(images * N, 5, generator=generator, dtype=torch.float64)
        spread = 8 * torch.tensor([sizes["X"], sizes["Y"]])
        named["means2d"] = ((1.2 * u[:, :2] - 0.1) * spread).to(dtype)
        a, c = 0.05 + 0.4 * u[:, 2], 0.05 + 0.4 * u[:, 3]
        b = 0.8 * (2 * u[:, 4] - 1) * (a * c).sqrt()
        named["conics"] = torch.stack([a, b, c], 1).to(dtype)
        return [*named.values()]


@op(
    "means2d[P, 2] conics[P, 3] colors[P, D] opacities[P] tile_offsets[I, Y, X] flatten_ids[M]"
    " depths?[P] background?[B, D] masks?[I, Y, X] absgrad?[P, 2] -> image[I, H, W, D]"
    " alpha[I, H, W] depth[I, H, W] median[I, H, W]",
    domain=dict(
        opacities=unit,
        tile_offsets=_tile_starts,
        flatten_ids=_splats,
        masks=_booleans,
        max_alpha=_alpha,
        min_alpha=_alpha,
        min_transmittance=unit,
        pixel_center=real,
    ),
    narrow=("colors",),
    base=TileOp,
)
def composite_tiles(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    tile_offsets: Tensor,
    flatten_ids: Tensor,
    *,
    depths: Tensor | None = None,
    background: Tensor | None = None,
    masks: Tensor | None = None,
    absgrad: Tensor | None = None,
    image_width: int,
    image_height: int,
    tile_size: int = 16,
    max_alpha: float = 0.999,
    min_alpha: float = LEAST_ALPHA,
    min_transmittance: float = 1e-4,
    pixel_center: float = 0.5,
    stop_at_min: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of Gaussian splats: colours, opacity and depths, front to back, in one pass.

    At a pixel, splats i of its tile's list have alpha_i = min(opacity_i exp(-sigma_i), max_alpha)
    with sigma_i = (a dx^2 + c dy^2) / 2 + b dx dy; those with sigma_i < 0 or alpha_i < min_alpha
    are passed over. w_i = alpha_i prod_{j<i} (1 - alpha_j), and the pixel ends before the splat
    that would bring the product to min_transmittance. colors = sum_i w_i color_i + T background,
    alpha = 1 - T, depth = sum_i w_i depth_i / alpha, and median_depth is that of the last splat
    that more than half of the light came to (docs/splats.md).

    Args:
        means2d: [..., N, 2] centres of the splats in pixels, x then y, `...` being images; or
            [P, 2], packed, of all images.
        conics: [..., N, 3] the inverse covariance (a, b, c) = [[a, b], [b, c]], per pixel^2.
        colors: [..., N, D] colours, or any features. May be bfloat16 or float16 where the others
            are float32.
        opacities: [..., N] from 0 to 1.
        tile_offsets: [..., th, tw] where the list of each tile begins in flatten_ids, row by row of
            each image; it ends where the next begins. int64 or int32.
        flatten_ids: [M] the splats of all lists, front to back, as indices of the flattened [P].
            int64 or int32.

    Keyword Args:
        depths: [..., N] of the splats; None for depths 0 at no cost.
        background: [..., D] a colour of each image, [..., H, W, D] of each pixel, or [D] for all;
            None for black.
        masks: [..., th, tw] bool; tiles where it is False are background.
        absgrad: [..., N, 2], any values; its gradient is that of means2d with the absolute value of
            what each pixel adds to it, for the densification of gsplat. None for no cost.
        image_width, image_height: W and H in pixels.
        tile_size: width of the square tiles in pixels, up to 16.
        preset: where the constants below come from unless given: `"gsplat15"` (gsplat 1.5.3),
            `"gsplat"` (its head), `"inria"` (diff-gaussian-rasterization).
        max_alpha, min_alpha: see above.
        min_transmittance: see above; `stop_at_min` says whether to reach it exactly is to end.
        pixel_center: where in a pixel it is sampled, 0.5 or 0.

    Returns:
        TileComposite(colors [..., H, W, D], alpha [..., H, W], depth [..., H, W],
        median_depth [..., H, W]), colours premultiplied, depths 0 where nothing was met; float32
        for half precision inputs. Differentiable in all floating point inputs, twice through the
        reference; an alpha at max_alpha gives no gradient but that of its colour and depth, and
        median_depth one to the depth of its splat alone.

    Raises:
        ValueError: for shapes or devices that do not match, and on the CPU for lists that leave
            flatten_ids, or ids that are no splats; elsewhere these read other splats.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ.
        NotImplementedError: under vmap: images are leading dimensions.

    Source:
        Kerbl et al., 3D Gaussian Splatting (2023), eq. 3; gsplat, `rasterize_to_pixels`; Huang et
        al., 2D Gaussian Splatting (2024), for the median.

    Example:
        >>> import torch, rayfuse
        >>> mean, conic = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0, 1.0]])
        >>> image = rayfuse.composite_tiles(
        ...     mean, conic, torch.tensor([[2.0]]), torch.tensor([0.5]),
        ...     torch.tensor([[0]]), torch.tensor([0]), depths=torch.tensor([4.0]),
        ...     image_width=1, image_height=1,
        ... )
        >>> image.colors, image.alpha, image.depth, image.median_depth
        (tensor([[[1.]]]), tensor([[0.5000]]), tensor([[4.]]), tensor([[4.]]))
    """
    finite = colors.isfinite().all(1)
    if depths is not None:
        finite = finite & depths.isfinite()
    lists = ListedSplats(tile_offsets, flatten_ids, masks, means2d, conics, opacities, finite)
    weight, before = lists.weigh(
        *(tile_size, max_alpha, min_alpha, min_transmittance, pixel_center, stop_at_min),
        absgrad=absgrad,
    )
    transmittance = before[..., -1]
    # autocast would make it less precise
    with torch.autocast(weight.device.type, enabled=False):
        image = weight @ lists.of_splats(colors).to(weight.dtype)
    # 1 - transmittance would have lost digits where it is small
    opacity = weight.sum(-1)
    depth, median = torch.zeros_like(opacity), torch.zeros_like(opacity)
    if depths is not None:
        met = opacity > 0
        z = lists.of_splats(depths)[:, None]
        depth = torch.where(met, (weight * z).sum(-1) / torch.where(met, opacity, 1), 0)
        early = (weight > 0) & (before[..., :-1] > 0.5)
        last = early & (early.cumsum(-1) == early.sum(-1, keepdim=True))
        median = torch.where(last, z, 0).sum(-1)

    def pixels(x: Tensor) -> Tensor:
        return lists.as_images(x)[:, :image_height, :image_width]

    image, opacity, depth, median = map(pixels, (image, opacity, depth, median))
    if background is not None:
        images = len(tile_offsets)
        shape = image.shape if len(background) != images else (images, 1, 1, image.shape[-1])
        image = image + pixels(transmittance)[..., None] * background.reshape(shape)
    return image.contiguous(), opacity.contiguous(), depth.contiguous(), median.contiguous()


class ListedSplats:
    """The lists of all tiles in PyTorch, as long as the longest one, without what is skipped."""

    def __init__(
        self,
        offsets: Tensor,
        ids: Tensor,
        masks: Tensor | None,
        means2d: Tensor,
        conics: Tensor,
        opacities: Tensor,
        finite: Tensor | bool = True,
    ) -> None:
        M = len(ids)
        begin = offsets.flatten()
        count = torch.cat([begin[1:], begin.new_tensor([M])]) - begin
        if masks is not None:
            count = torch.where(masks.flatten() != 0, count, 0)
        longest = int(count.max()) if len(count) else 0
        place = torch.arange(longest, device=ids.device)
        self.tiles = offsets.shape
        self.ids = ids[(begin[:, None] + place).clamp(max=M - 1)]  # [tiles, K]
        finite = finite & means2d.isfinite().all(1) & conics.isfinite().all(1)
        self.listed = (place < count[:, None]) & (finite & opacities.isfinite())[self.ids]
        self._splats = means2d, conics, opacities

    def of_splats(self, x: Tensor) -> Tensor:
        """[tiles, K, ...]; what is skipped must leave no NaN behind, in gradients neither."""
        skipped = self.listed.logical_not().view(*self.listed.shape, *[1] * (x.dim() - 1))
        return x[self.ids].masked_fill(skipped, 0)

    def weigh(
        self,
        size: int,
        max_alpha: float,
        min_alpha: float,
        min_transmittance: float,
        center: float,
        stop_at_min: bool,
        *,
        absgrad: Tensor | None = None,
        begun: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weights [tiles, pixels, K], and T before each and behind all of them, [.., K+1]; before
        the first it is begun [I, H, W]."""
        means2d, conics, opacities = self._splats
        x, y = _pixels(self.tiles, size, center, means2d)  # [tiles, pixels, 1]
        centers = zip(self.of_splats(means2d).unbind(-1), (x, y), strict=True)
        dx, dy = (m[:, None] - p for m, p in centers)
        if absgrad is not None:
            dx, dy = map(_WithAbsolute.apply, (dx, dy), absgrad[self.ids].unbind(-1))
        a, b, c = (v[:, None] for v in self.of_splats(conics).unbind(-1))
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        inside = self.listed[:, None] & (sigma >= 0)
        alpha = self.of_splats(opacities)[:, None] * torch.exp(-torch.where(inside, sigma, 0))
        alpha = torch.where(inside & (alpha >= min_alpha), alpha.clamp(max=max_alpha), 0)
        first = torch.ones_like(x) if begun is None else self._of_pixels(begun, size)
        after = first * (1 - alpha).cumprod(-1)
        accepted = after > min_transmittance if stop_at_min else after >= min_transmittance
        alpha = torch.where(accepted, alpha, 0)
        before = torch.cat([first, first * (1 - alpha).cumprod(-1)], -1)
        return alpha * before[..., :-1], before

    def as_images(self, x: Tensor) -> Tensor:
        """[tiles, pixels, ...] as images of whole tiles."""
        (count, Y, X), size = self.tiles, math.isqrt(x.shape[1])
        x = x.reshape(count, Y, X, size, size, *x.shape[2:]).transpose(2, 3)
        return x.reshape(count, Y * size, X * size, *x.shape[5:])

    def _of_pixels(self, x: Tensor, size: int) -> Tensor:
        """Images [I, H, W] as [tiles, pixels, 1]."""
        (count, Y, X), (H, W) = self.tiles, x.shape[1:]
        x = torch.nn.functional.pad(x, (0, X * size - W, 0, Y * size - H))
        x = x.reshape(count, Y, size, X, size).transpose(2, 3)
        return x.reshape(count * Y * X, size * size, 1)


def _pixels(tiles: Sequence[int], size: int, center: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of the pixels of all tiles, [tiles, pixels, 1] each."""
    inner = torch.arange(size, device=like.device)
    tile = torch.arange(tiles[1] * tiles[2], device=like.device).repeat(tiles[0])
    x = (tile % tiles[2])[:, None, None] * size + inner[None, None, :]
    y = (tile // tiles[2])[:, None, None] * size + inner[None, :, None]
    x, y = torch.broadcast_tensors(x, y)
    return tuple((v.flatten(1)[..., None] + center).to(like.dtype) for v in (x, y))
