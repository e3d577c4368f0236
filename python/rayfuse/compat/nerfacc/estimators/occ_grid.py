"""nerfacc.estimators.occ_grid: samples where a grid says that space is occupied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..grid import traverse_grids
from ..volrend import render_visibility_from_alpha, render_visibility_from_density

__all__ = ["OccGridEstimator"]


class OccGridEstimator(nn.Module):
    """Occupancy of space in nested grids of cells, learnt from a field while it trains.

    Its state is nerfacc's, so that checkpoints load.

    Args:
        roi_aabb: [6] the box of the finest grid: its least x, y, z, then its greatest. Each further
            grid has twice the extent.
        resolution: cells along an axis, or along x, y and z.
        levels: how many grids.

    Source:
        Müller et al., Instant Neural Graphics Primitives (2022); Li et al., NerfAcc (2023).

    Example:
        >>> import torch
        >>> from rayfuse.compat import nerfacc
        >>> grid = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], resolution=16)
        >>> grid.update_every_n_steps(0, lambda x: (x[:, :1] > 0).float())
        >>> o, d = torch.tensor([[-2.0, 0, 0]]), torch.tensor([[1.0, 0, 0]])
        >>> ray_indices, t_starts, t_ends = grid.sampling(o, d, render_step_size=0.25)
        >>> t_starts
        tensor([2.0000, 2.2500, 2.5000, 2.7500])
    """

    occs: Tensor
    aabbs: Tensor
    binaries: Tensor
    resolution: Tensor
    grid_coords: Tensor
    grid_indices: Tensor

    def __init__(
        self,
        roi_aabb: Sequence[float] | Tensor,
        resolution: int | Sequence[int] | Tensor = 128,
        levels: int = 1,
    ) -> None:
        super().__init__()
        if isinstance(resolution, int):
            resolution = [resolution] * 3
        cells = torch.as_tensor(resolution, dtype=torch.int32)
        box = torch.as_tensor(roi_aabb, dtype=torch.float32)
        if cells.shape != (3,) or box.shape != (6,):
            got = f"{list(box.shape)} and {list(cells.shape)}"
            raise ValueError(f"roi_aabb must have shape [6] and resolution [3], got {got}")
        centre, half = (box[3:] + box[:3]) / 2, (box[3:] - box[:3]) / 2
        aabbs = [torch.cat([centre - half * 2**i, centre + half * 2**i]) for i in range(levels)]
        shape = cells.tolist()
        coords = torch.cartesian_prod(*map(torch.arange, shape)).view(-1, 3)
        self.levels, self.cells_per_lvl = levels, len(coords)
        self.register_buffer("resolution", cells)
        self.register_buffer("aabbs", torch.stack(aabbs))
        self.register_buffer("occs", torch.zeros(levels * len(coords)))
        self.register_buffer("binaries", torch.zeros(levels, *shape, dtype=torch.bool))
        self.register_buffer("grid_coords", coords, persistent=False)
        self.register_buffer("grid_indices", torch.arange(len(coords)), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.occs.device

    @torch.no_grad()
    def sampling(
        self,
        rays_o: Tensor,
        rays_d: Tensor,
        sigma_fn: Callable | None = None,
        alpha_fn: Callable | None = None,
        near_plane: float = 0.0,
        far_plane: float = 1e10,
        t_min: Tensor | None = None,
        t_max: Tensor | None = None,
        render_step_size: float = 1e-3,
        early_stop_eps: float = 1e-4,
        alpha_thre: float = 0.0,
        stratified: bool = False,
        cone_angle: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Samples of rays in occupied cells.

        Args:
            rays_o, rays_d: [R, 3] origins, and directions of length 1.
            sigma_fn: (t_starts, t_ends, ray_indices) -> densities [P], to leave out samples that
                cannot be seen, see `render_visibility_from_density`.
            alpha_fn: the same with opacities.
            near_plane, far_plane, t_min, t_max: where rays begin and end; the latter [R], each ray.
            render_step_size, cone_angle: see `traverse_grids`.
            early_stop_eps, alpha_thre: what can be seen; the latter not more than the mean
                occupancy of the grid.
            stratified: shift the samples of each ray by a random part of a step.

        Returns:
            ray_indices, t_starts, t_ends: [P] each, rays in order.
        """
        near = torch.full_like(rays_o[:, 0], near_plane)
        far = torch.full_like(near, far_plane)
        near = near if t_min is None else near.maximum(t_min)
        far = far if t_max is None else far.minimum(t_max)
        if stratified:
            near = near + torch.rand_like(near) * render_step_size
        intervals, samples, _ = traverse_grids(
            *(rays_o, rays_d, self.binaries, self.aabbs, near, far, render_step_size, cone_angle)
        )
        assert samples.ray_indices is not None
        ray_indices = samples.ray_indices
        t_starts, t_ends = intervals.vals[intervals.is_left], intervals.vals[intervals.is_right]
        look = sigma_fn or alpha_fn
        if look is None or (alpha_thre <= 0 and early_stop_eps <= 0) or len(ray_indices) == 0:
            return ray_indices, t_starts, t_ends
        seen: dict[str, Any] = dict(
            packed_info=samples.packed_info,
            early_stop_eps=early_stop_eps,
            alpha_thre=min(alpha_thre, self.occs.mean().item()),
        )
        opaque = look(t_starts, t_ends, ray_indices)
        if opaque.shape != t_starts.shape:
            rule = f"{list(t_starts.shape)}"
            raise ValueError(f"sigma_fn must return shape {rule}, got {list(opaque.shape)}")
        if sigma_fn is not None:
            kept = render_visibility_from_density(t_starts, t_ends, opaque, **seen)
        else:
            kept = render_visibility_from_alpha(opaque, **seen)
        return ray_indices[kept], t_starts[kept], t_ends[kept]

    @torch.no_grad()
    def update_every_n_steps(
        self,
        step: int,
        occ_eval_fn: Callable[[Tensor], Tensor],
        occ_thre: float = 1e-2,
        ema_decay: float = 0.95,
        warmup_steps: int = 256,
        n: int = 16,
    ) -> None:
        """Look at the field again, in every n-th step of training.

        Args:
            occ_eval_fn: positions [P, 3] -> occupancy [P, 1], such as density times a step.
            occ_thre: a cell is occupied above it, or above the mean where that is less.
            ema_decay: what is left of a cell's occupancy where the field is less.
            warmup_steps: first all cells are looked at, then a quarter, and as many that are
                occupied.
        """
        if not self.training:
            raise RuntimeError(
                "update_every_n_steps: the module must be in training mode, got eval; "
                "_update() looks at the field in any mode"
            )
        if step % n == 0:
            self._update(step, occ_eval_fn, occ_thre, ema_decay, warmup_steps)

    @torch.no_grad()
    def mark_invisible_cells(
        self,
        K: Tensor,
        c2w: Tensor,
        width: int,
        height: int,
        near_plane: float = 0.0,
        chunk: int = 32**3,
    ) -> None:
        """Exclude for good the cells that no camera sees, or that are too near to one.

        Args:
            K: [N, 3, 3] intrinsics, or [1, 3, 3]; cameras look along +z.
            c2w: [N, 3, 4] or [N, 4, 4] poses.
            width, height: of the images, in pixels.
            near_plane: cells that a camera sees nearer than this are excluded.
            chunk: how many cells at a time.
        """
        to_camera = c2w[:, :3, :3].transpose(1, 2)
        for level, (low, high) in enumerate(self.aabbs.view(-1, 2, 3)):
            for cells in self.grid_indices.split(chunk):
                x = low + self.grid_coords[cells] / (self.resolution - 1) * (high - low)
                pixels = K @ (to_camera @ (x.T - c2w[:, :3, 3:]))
                u, v = (pixels[:, :2] / pixels[:, 2:]).unbind(1)
                depth = pixels[:, 2]
                in_image = (depth >= 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
                near = in_image & (depth < near_plane)
                kept = in_image.any(0) & ~near.any(0)
                self.occs[level * self.cells_per_lvl + cells] = torch.where(kept, 0.0, -1.0)

    def _get_all_cells(self) -> list[Tensor]:
        """Of each level the cells that are not excluded."""
        return [self.grid_indices[occs >= 0] for occs in self.occs.view(self.levels, -1)]

    def _sample_uniform_and_occupied_cells(self, n: int) -> list[Tensor]:
        """Of each level n cells, and n or all occupied ones."""
        chosen = []
        for occs, binaries in zip(self.occs.view(self.levels, -1), self.binaries, strict=True):
            uniform = torch.randint(self.cells_per_lvl, (n,), device=self.device)
            occupied = binaries.flatten().nonzero()[:, 0]
            if n < len(occupied):
                occupied = occupied[torch.randint(len(occupied), (n,), device=self.device)]
            chosen.append(torch.cat([uniform[occs[uniform] >= 0], occupied]))
        return chosen

    @torch.no_grad()
    def _update(
        self,
        step: int,
        occ_eval_fn: Callable[[Tensor], Tensor],
        occ_thre: float = 0.01,
        ema_decay: float = 0.95,
        warmup_steps: int = 256,
    ) -> None:
        if step < warmup_steps:
            chosen = self._get_all_cells()
        else:
            chosen = self._sample_uniform_and_occupied_cells(self.cells_per_lvl // 4)
        for level, cells in enumerate(chosen):
            low, high = self.aabbs[level].chunk(2)
            coords = self.grid_coords[cells]
            x = (coords + torch.rand(coords.shape, device=self.device)) / self.resolution
            occ = occ_eval_fn(low + x * (high - low)).squeeze(-1).to(self.occs.dtype)
            cells = cells + level * self.cells_per_lvl
            # a cell may have been chosen more than once: it fades once, and the most counts
            self.occs[cells] = self.occs[cells] * ema_decay
            self.occs.scatter_reduce_(0, cells, occ, "amax")
        mean = self.occs[self.occs >= 0].mean()
        self.binaries = (self.occs > mean.clamp(max=occ_thre)).view(self.binaries.shape)
