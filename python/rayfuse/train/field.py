"""A small radiance and feature field for a CPU: hashed grids and narrow MLPs, plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayfuse.train.space import Space, spherical_harmonics

HASH_STRIDES = (73856093, 19349669, 1)
# the corners of a cell: which side along x, y, z
CORNERS = tuple((i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1))


class _Interpolate(torch.autograd.Function):
    """Weighted sum of table rows; the gradient goes to one row drawn by weight (unbiased).

    One row instead of eight makes the backward pass several times cheaper, and trains further
    in the same time. Positions get no gradient.
    """

    @staticmethod
    def forward(ctx, table, corners, weights, drawn):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(drawn)
        ctx.shape = table.shape
        return F.embedding_bag(corners, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx, d_out):  # type: ignore[no-untyped-def]
        (drawn,) = ctx.saved_tensors
        d_table = d_out.new_zeros(ctx.shape)
        return d_table.index_add_(0, drawn, d_out), None, None, None


class HashGrid(nn.Module):
    """Trilinear interpolation in a pyramid of grids, large ones folded by an additive hash.

    A cell's row is x·p + y·q + z masked to the table, in dense and folded levels alike, so its
    eight corners are one base row plus eight constants. Source of the pyramid: Instant NGP
    (Müller et al. 2022); the additive hash replaces its exclusive or.

    Args:
        levels: number of grids, from `coarsest` to `finest` points a side in geometric steps.
        channels: values per grid point.
        log2_rows: at most 2**log2_rows points are stored per level.
        scale: standard deviation of the initial values.
    """

    side: Tensor
    mask: Tensor
    origin: Tensor
    stride: Tensor

    def __init__(
        self,
        levels: int,
        channels: int,
        log2_rows: int,
        coarsest: int,
        finest: int,
        scale: float = 1e-2,
    ) -> None:
        super().__init__()
        growth = (finest / coarsest) ** (1 / max(levels - 1, 1))
        sides = [round(coarsest * growth**level) for level in range(levels)]
        rows, strides = [], []
        for side in sides:
            dense = math.ceil(math.log2(side**3))
            rows.append(2 ** min(dense, log2_rows))
            strides.append((side * side, side, 1) if dense <= log2_rows else HASH_STRIDES)
        self.levels, self.channels = levels, channels
        self.table = nn.Parameter(torch.randn(sum(rows), channels) * scale)

        def column(values: list) -> Tensor:  # type: ignore[type-arg]
            return torch.tensor(values, dtype=torch.int32)[..., None]

        origins = [sum(rows[:level]) for level in range(levels)]
        self.register_buffer("side", column(sides), persistent=False)  # [L, 1]
        self.register_buffer("mask", column(rows) - 1, persistent=False)  # [L, 1]
        self.register_buffer("origin", column(origins), persistent=False)  # [L, 1]
        stride = column(strides).transpose(0, 1).contiguous()
        self.register_buffer("stride", stride, persistent=False)  # [3, L, 1]

    def _cells(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Lower corner's row before masking [L, M], and place in the cell [3, L, M]."""
        # coordinates lie in planes, so that every operation runs along M
        x = u.t().contiguous()[:, None] * (self.side - 1)
        cell = torch.minimum(x.floor().clamp_min_(0), self.side - 2)
        place = x.sub_(cell)
        scaled = cell.int().mul_(self.stride)
        return scaled[0] + scaled[1] + scaled[2], place

    def _corners(self, base: Tensor) -> Tensor:
        """Rows [L * M, 8] of the eight corners."""
        p, q, r = self.stride
        offsets = [i * p + j * q + k * r for i, j, k in CORNERS]
        rows = [(base + offset).bitwise_and_(self.mask).add_(self.origin) for offset in offsets]
        return torch.stack(rows, dim=-1).view(-1, 8)

    def forward(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        """Values [M, levels * channels] at u[M, 3] in the unit cube.

        Args:
            generator: draws the corner that receives the gradient; None for no gradient.
        """
        base, place = self._cells(u)
        if generator is None:
            drawn = base.new_empty(0)
        else:
            chance = torch.rand((3, 1, len(u)), generator=generator, device=u.device)
            upper = (chance < place).int().mul_(self.stride)
            drawn = (base + upper[0]).add_(upper[1]).add_(upper[2])
            drawn = drawn.bitwise_and_(self.mask).add_(self.origin).flatten().long()
        weights = _corner_products([(1 - f, f) for f in place])
        out = _Interpolate.apply(self.table, self._corners(base), weights, drawn)
        levels = out.view(self.levels, len(u), self.channels).transpose(0, 1)
        return levels.reshape(len(u), self.levels * self.channels)

    def pull(self, u: Tensor, d_out: Tensor) -> Tensor:
        """Exact gradient [M, 3] with respect to u of (forward(u) * d_out).sum()."""
        base, place = self._cells(u)
        corners = self._corners(base)
        d_out = d_out.view(len(u), self.levels, self.channels).transpose(0, 1)
        gradient = []
        for axis in range(3):
            sides = [(1 - f, f) for f in place]
            sides[axis] = (-torch.ones_like(place[0]), torch.ones_like(place[0]))
            slope = F.embedding_bag(
                corners, self.table, per_sample_weights=_corner_products(sides), mode="sum"
            )
            along = (slope.view_as(d_out) * d_out).sum(-1)
            gradient.append((along * (self.side - 1)).sum(0))
        return torch.stack(gradient, dim=-1)


def _corner_products(sides: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Products over the axes of the (lower, upper) factors [L, M] of each corner: [L * M, 8]."""
    x, y, z = sides
    face = [a * b for a in y for b in z]
    return torch.stack([a * b for a in x for b in face], dim=-1).view(-1, 8)


class ProposalField(nn.Module):
    """Density alone, for choosing samples: exp of the sum of one-channel grids."""

    def __init__(self, levels: int, coarsest: int, finest: int, log2_rows: int) -> None:
        super().__init__()
        self.grid = HashGrid(levels, 1, log2_rows, coarsest, finest, scale=1e-1)

    def forward(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        """Density [M] at u[M, 3] in the unit cube."""
        return torch.exp(self.grid(u, generator).sum(-1))


@dataclass
class FieldConfig:
    """Sizes of the field."""

    levels: int = 6
    """Grids in the pyramid."""
    channels: int = 4
    """Values per grid point."""
    log2_rows: int = 17
    """At most 2 to this many points are stored per grid."""
    coarsest: int = 16
    """Points along a side of the first grid."""
    finest: int = 512
    """Points along a side of the last grid."""
    hidden: int = 32
    """Width of every MLP."""
    geometry: int = 15
    """Values the density MLP hands to the colour and normal heads."""
    feature_levels: int = 3
    """Grids in the feature head's own pyramid."""
    feature_channels: int = 8
    """Values per grid point there."""
    feature_finest: int = 64
    """Points along a side of its last grid."""
    proposal_finest: tuple[int, int] = (64, 128)
    """Points along a side of the two proposal grids."""


class Field(nn.Module):
    """Density, colour, predicted normals and distilled features of a scene.

    Args:
        features: channels of each feature head by name; empty for none.
    """

    def __init__(self, config: FieldConfig, space: Space, features: dict[str, int]) -> None:
        super().__init__()
        self.space = space
        c = config
        self.grid = HashGrid(c.levels, c.channels, c.log2_rows, c.coarsest, c.finest)
        self.density_in = nn.Linear(c.levels * c.channels, c.hidden)
        self.density_out = nn.Linear(c.hidden, 1 + c.geometry)
        self.colour_in = nn.Linear(c.geometry, c.hidden)
        self.colour_view = nn.Linear(9, c.hidden, bias=False)
        self.colour_hidden = nn.Linear(c.hidden, c.hidden)
        self.colour_out = nn.Linear(c.hidden, 3)
        self.normal_in = nn.Linear(c.geometry + 3, c.hidden)
        self.normal_out = nn.Linear(c.hidden, 3)
        self.feature_heads = nn.ModuleDict(
            {name: FeatureHead(config, channels) for name, channels in features.items()}
        )

    def grids(self) -> list[nn.Parameter]:
        """The tables of the field and of its feature heads."""
        return [module.table for module in self.modules() if isinstance(module, HashGrid)]

    def geometry(self, u: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Density [M] and embedding [M, G] at u[M, 3] in the unit cube."""
        hidden = F.relu(self.density_in(self.grid(u, generator)))
        out = self.density_out(hidden)
        return torch.exp(out[:, 0].clamp(max=15.0) - 1.0), out[:, 1:]

    @torch.no_grad()
    def normals(self, x: Tensor) -> Tensor:
        """Unit normals [M, 3] at world positions x[M, 3]: against the gradient of density.

        Exact derivative of the trilinear interpolation, the MLP and the warp. No graph is built,
        as in nerfstudio: terms on these normals train the predicted normals, never the density.
        """
        with torch.enable_grad():
            position = x.detach().requires_grad_()
            u = self.space.warp(position)
        at = u.detach()
        hidden = self.density_in(self.grid(at, None))
        d_hidden = torch.where(hidden > 0, self.density_out.weight[0], 0.0)
        d_u = self.grid.pull(at, d_hidden @ self.density_in.weight)
        (gradient,) = torch.autograd.grad(u, position, d_u)
        return -F.normalize(gradient, dim=-1, eps=1e-20)

    def view(self, directions: Tensor) -> Tensor:
        """What colours depend on of unit directions[R, 3]: [R, V]."""
        return self.colour_view(spherical_harmonics(directions))

    def colour(self, embedding: Tensor, view: Tensor) -> Tensor:
        """Colour [..., 3] from embedding[..., G] and the view [..., V] of its ray."""
        hidden = F.relu(self.colour_in(embedding) + view)
        return torch.sigmoid(self.colour_out(F.relu(self.colour_hidden(hidden))))

    def predicted_normals(self, embedding: Tensor, u: Tensor) -> Tensor:
        """Unit normals [..., 3] in the world from embedding[..., G] at u[..., 3]."""
        hidden = F.relu(self.normal_in(torch.cat([embedding, 2 * u - 1], dim=-1)))
        return F.normalize(self.normal_out(hidden), dim=-1, eps=1e-6)


class FeatureHead(nn.Module):
    """A pyramid of its own and one hidden layer, then a linear map to the feature's channels.

    The linear map is applied after compositing, to one vector per ray: it commutes with the
    weighted sum over samples, Σ w (A h + b) = A (Σ w h) + b Σ w.
    """

    def __init__(self, config: FieldConfig, channels: int) -> None:
        super().__init__()
        width = config.feature_levels * config.feature_channels
        self.grid = HashGrid(
            config.feature_levels,
            config.feature_channels,
            config.log2_rows,
            config.coarsest,
            config.feature_finest,
        )
        self.hidden = nn.Linear(width, config.hidden)
        self.out = nn.Linear(config.hidden, channels)

    def hidden_layer(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        """h [..., H] at u[..., 3]. Positions carry no gradient anywhere in this field."""
        hidden = F.relu(self.hidden(self.grid(u.view(-1, 3), generator)))
        return hidden.view(*u.shape[:-1], hidden.shape[-1])

    def forward(self, total: Tensor, accumulation: Tensor) -> Tensor:
        """Rendered feature [R, channels] from Σ w h [R, H] and Σ w [R]."""
        return F.linear(total, self.out.weight) + self.out.bias * accumulation[:, None]
