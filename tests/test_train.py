"""`rayfuse train`: scenes, features, field, objective, the loop and the command line."""

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import rayfuse
from rayfuse import cli
from rayfuse.train import InputError, InputWarning, trainer
from rayfuse.train import run as runs
from rayfuse.train import scene as scenes
from rayfuse.train.config import PRESETS, TrainConfig, parse
from rayfuse.train.evaluate import render_view
from rayfuse.train.features import FeatureConfig, FeatureMap, Trunk, extract
from rayfuse.train.field import CORNERS, Field, FieldConfig, HashGrid
from rayfuse.train.model import (
    DenseSamples,
    PackedSamples,
    SamplerConfig,
    make_model,
    resample,
)
from rayfuse.train.objective import (
    Batch,
    Objective,
    ObjectiveConfig,
    adaptive_feature_weight,
    depth_loss,
    get_scheduled_loss_weight,
)
from rayfuse.train.options import from_json, to_json
from rayfuse.train.space import Contraction, Frustum

ROOT = Path(__file__).parents[1]
FOX = ROOT.parent / "shared" / "data" / "fox"


def look_at(eye: torch.Tensor) -> torch.Tensor:
    """Camera-to-world of a camera at `eye` that looks at the origin, y up."""
    back = F.normalize(eye, dim=0)
    right = F.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), back), dim=0)
    pose = torch.eye(4)
    pose[:3] = torch.stack([right, torch.linalg.cross(back, right), back, eye], dim=1)
    return pose


def write_scene(folder: Path, views: int, side: int = 40, **shared) -> dict:
    """A coloured ball in front of nothing, ray traced, as a transforms.json scene."""
    (folder / "images").mkdir(parents=True)
    frames = []
    focal = 1.2 * side
    for number in range(views):
        angle = 2 * math.pi * number / views
        pose = look_at(torch.tensor([3 * math.sin(angle), 1.0, 3 * math.cos(angle)]))
        at = (torch.arange(side) + 0.5 - side / 2) / focal
        y, x = torch.meshgrid(at, at, indexing="ij")
        d = F.normalize(torch.stack([x, -y, -torch.ones_like(x)], -1) @ pose[:3, :3].T, dim=-1)
        b = (d * pose[:3, 3]).sum(-1)
        root = b**2 - (pose[:3, 3] ** 2).sum() + 0.49
        hit = pose[:3, 3] + d * (-b - root.clamp_min(0).sqrt())[..., None]
        rgba = torch.cat([0.5 + 0.7 * hit, (root[..., None] > 0).float()], dim=-1)
        pixels = (rgba.clamp(0, 1) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / "images" / f"{number:03d}.png")
        frames.append({"file_path": f"images/{number:03d}.png", "transform_matrix": pose.tolist()})
    content = {"fl_x": focal, "w": side, "h": side, "frames": frames, **shared}
    (folder / "transforms.json").write_text(json.dumps(content))
    return content


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene") / "ball"
    write_scene(folder, views=24)
    return folder


@pytest.fixture
def own_ball(tmp_path):
    """A scene to damage, its content, and a function that stores the damaged content."""
    folder = tmp_path / "ball"
    content = write_scene(folder, views=4, side=16)

    def store():
        (folder / "transforms.json").write_text(json.dumps(content))

    return folder, content, store


def tiny(**changes) -> TrainConfig:
    config = replace(PRESETS["tiny"][1], preset="tiny")
    return replace(config, features=FeatureConfig(feature_type="NONE"), **changes)


# few samples, for seconds
OCCUPANCY = dict(kind="occupancy", grid_resolution=12, grid_steps=24, samples_per_step=1024)


def run(*arguments: object) -> int:
    return cli.main(["train", *map(str, arguments)])


class TestScene:
    def test_rays_pass_through_known_points(self, ball):
        """A pixel's ray goes through the world point that the camera equation puts there."""
        scene = scenes.load_scene(ball)
        # recover the similarity between the file's world and the scene's from the cameras
        content = json.loads((ball / "transforms.json").read_text())
        poses = torch.tensor([frame["transform_matrix"] for frame in content["frames"]])
        scale = (scene.poses[0, :, 3] - scene.poses[1, :, 3]).norm() / (
            poses[0, :3, 3] - poses[1, :3, 3]
        ).norm()
        shift = scene.poses[0, :, 3] - scale * poses[0, :3, 3]
        point = torch.tensor([0.2, -0.1, 0.3])
        for view in range(3):
            local = poses[view, :3, :3].T @ (point - poses[view, :3, 3])
            u = content["fl_x"] * local[0] / -local[2] + 20
            v = content["fl_x"] * -local[1] / -local[2] + 20
            pixels = torch.tensor([[int(v), int(u)]])
            rays = scene.rays(view * scene.pixels + pixels[:, 0] * 40 + pixels[:, 1])
            toward = F.normalize(scale * point + shift - rays.origins[0], dim=0)
            # within the half diagonal of a pixel
            assert (toward @ rays.directions[0]).acos() < 0.75 / content["fl_x"]

    def test_lens_distortion_is_undone(self, own_ball):
        folder, content, store = own_ball
        lens = {"k1": 0.1, "k2": -0.05, "k3": 0.01, "k4": 0.002, "p1": 0.003, "p2": -0.002}
        content.update(lens)
        store()
        x, y = scenes.load_scene(folder).plane[0].double().unbind(-1)
        r2 = x * x + y * y
        radial = 1 + 0.1 * r2 - 0.05 * r2**2 + 0.01 * r2**3 + 0.002 * r2**4
        u = x * radial + 2 * 0.003 * x * y - 0.002 * (r2 + 2 * x * x)
        v = y * radial + 0.003 * (r2 + 2 * y * y) - 2 * 0.002 * x * y
        at = (torch.arange(16) + 0.5 - 8) / content["fl_x"]
        assert (u - at).abs().max() < 1e-6
        assert (v - at[:, None]).abs().max() < 1e-6

    def test_every_eighth_view_is_held_out(self, ball):
        scene = scenes.load_scene(ball)
        assert (scene.split, scene.test_views) == ("views", [0, 8, 16])
        drawn = scene.draw(2000, torch.Generator().manual_seed(0)) // scene.pixels
        assert sorted(drawn.unique().tolist()) == scene.train_views
        assert set(scene.train_views).isdisjoint(scene.test_views)

    def test_held_out_pixels_are_never_drawn_and_have_no_depth(self):
        scene = scenes.load_motorcycle(crop=48)
        assert scene.split == "pixels"
        assert 0.05 < scene.held_out.float().mean() < 0.15
        drawn = scene.draw(5000, torch.Generator().manual_seed(0))
        assert not scene.held_out.flatten()[drawn].any()
        assert scene.depth is not None
        assert scene.depth[0].isfinite().float().mean() > 0.5
        assert not scene.depth[scene.held_out].isfinite().any()

    def test_features_never_see_a_held_out_pixel(self):
        scene = scenes.load_motorcycle(crop=64)
        before = extract(scene, FeatureConfig(channels=4))["feature"].values
        scene.rgb[scene.held_out] = torch.rand_like(scene.rgb[scene.held_out])
        assert torch.equal(before, extract(scene, FeatureConfig(channels=4))["feature"].values)

    def test_motorcycle_depth_agrees_between_the_two_photographs(self):
        """A left pixel's depth, projected into the right photograph, lands on the same colour."""
        scene = scenes.load_motorcycle()
        assert scene.depth is not None
        h, w = scene.rgb.shape[1:3]
        known = scene.depth[0].isfinite().flatten().nonzero().flatten()
        rays = scene.rays(known)
        point = rays.origins + rays.directions * scene.depth[0].flatten()[known, None]
        plane = (point - scene.poses[1, :, 3])[:, :2] / -point[:, 2:]
        # pixel pitch and position of the right camera's plane
        pitch = scene.plane[1, 0, 1, 0] - scene.plane[1, 0, 0, 0]
        u = ((plane[:, 0] - scene.plane[1, 0, 0, 0]) / pitch).round().long()
        v = ((-plane[:, 1] - scene.plane[1, 0, 0, 1]) / pitch).round().long()
        inside = (u >= 0) & (u < w) & (v >= 0) & (v < h)
        left = scene.rgb[0].view(-1, 3)[known]
        error = (left - scene.rgb[1][v.clamp(0, h - 1), u.clamp(0, w - 1)]).abs().mean(-1)[inside]
        shifted = (left - scene.rgb[1][v.clamp(0, h - 1), (u + 6).clamp(0, w - 1)]).abs().mean(-1)
        assert error.median() < 0.02 < 0.5 * shifted[inside].median()

    def test_blender_form_and_alpha(self, tmp_path):
        """camera_angle_x alone, file names without extension, RGBA photographs."""
        folder = tmp_path / "lego"
        content = write_scene(folder, views=9, side=16)
        focal = content.pop("fl_x")
        del content["w"], content["h"]
        content["camera_angle_x"] = 2 * math.atan(8 / focal)
        for frame in content["frames"]:
            path = folder / frame["file_path"]
            rgba = np.full((16, 16, 4), 255, np.uint8)
            rgba[..., 3] = 51
            Image.fromarray(rgba).save(path)
            frame["file_path"] = f"./{frame['file_path'].removesuffix('.png')}"
        (folder / "transforms.json").rename(folder / "transforms_train.json")
        (folder / "transforms_train.json").write_text(json.dumps(content))
        scene = scenes.load_scene(folder)
        assert scene.alpha is not None and torch.allclose(scene.alpha, torch.tensor(0.2))
        assert scene.rgb.max() <= 0.2
        pitch = scene.plane[0, 0, 1, 0] - scene.plane[0, 0, 0, 0]
        assert pitch.item() == pytest.approx(1 / focal, rel=1e-5)

    def test_intrinsics_of_a_frame_override_the_shared_ones(self, own_ball):
        folder, content, store = own_ball
        content["frames"][2]["fl_x"] = 40.0
        store()
        scene = scenes.load_scene(folder)
        assert len(scene.plane) == 2
        pitch = scene.plane[scene.camera, 0, 1, 0] - scene.plane[scene.camera, 0, 0, 0]
        expected = torch.full((4,), 1 / content["fl_x"]).index_fill_(0, torch.tensor(2), 1 / 40)
        assert torch.allclose(pitch, expected)

    def test_downscaling_averages_blocks_and_scales_the_camera(self, ball):
        full, half = scenes.load_scene(ball), scenes.load_scene(ball, 2)
        blocks = full.rgb.view(24, 20, 2, 20, 2, 3).mean((2, 4))
        assert torch.allclose(half.rgb, blocks, atol=1e-6)
        middles = full.plane.view(1, 20, 2, 20, 2, 2).mean((2, 4))
        assert torch.allclose(half.plane, middles, atol=1e-6)

    def test_a_minority_of_missing_images_is_left_out_with_a_warning(self, own_ball):
        folder, _, _ = own_ball
        (folder / "images" / "001.png").unlink()
        with pytest.warns(InputWarning, match=r"1 of the 4 images .* left out, .*001\.png"):
            assert scenes.load_scene(folder).names == ["000", "002", "003"]

    def test_pixels_are_filled_from_their_side_neighbours(self):
        rgb = torch.arange(27.0).view(1, 3, 3, 3)
        missing = torch.zeros(1, 3, 3, dtype=torch.bool)
        missing[0, 1, 1] = missing[0, 0, 1] = True
        filled = scenes.fill_from_neighbours(rgb, missing)
        expected = (rgb[0, 1, 0] + rgb[0, 1, 2] + rgb[0, 2, 1]) / 3
        assert torch.allclose(filled[0, 1, 1], expected)
        assert torch.equal(filled[~missing], rgb[~missing])


class TestSpace:
    def test_contraction_is_a_bounded_bijection_with_matching_distances(self):
        space = Contraction()
        near, far = torch.tensor([[0.2]]), torch.tensor([[100.0]])
        t = space.distance(torch.linspace(0, 1, 400)[None], near, far)
        assert torch.allclose(t[0, [0, -1]], torch.tensor([0.2, 100.0]), rtol=1e-4)
        assert (t.diff() > 0).all()
        assert torch.allclose(space.spacing(t, near, far)[0], torch.linspace(0, 1, 400), atol=1e-5)
        x = torch.tensor([[0.3, 0.0, 0.4], [3.0, 0.0, 4.0], [0.0, -1e6, 0.0]])
        expected = torch.tensor([[0.3, 0.0, 0.4], [1.8 * 0.6, 0.0, 1.8 * 0.8], [0.0, -2.0, 0.0]])
        assert torch.allclose(space.warp(x), expected / 4 + 0.5, atol=1e-5)

    def test_frustum_maps_its_corners_onto_the_cube(self):
        space = Frustum([-0.5, -0.4, 0.25], [0.5, 0.4, 0.5])
        x = torch.tensor([[-1.0, -0.8, -2.0], [2.0, 1.6, -4.0]])
        assert torch.allclose(space.warp(x), torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]))
        t = space.distance(torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor(2.0), torch.tensor(4.0))
        assert torch.allclose(t, torch.tensor([[2.0, 8 / 3, 4.0]]))
        s = space.spacing(t, torch.tensor(2.0), torch.tensor(4.0))
        assert torch.allclose(s, torch.tensor([[0.0, 0.5, 1.0]]))
        assert space.box() == ([-2.0, -1.6, -4.0, 2.0, 1.6, -2.0], False)


def trilinear(grid: HashGrid, u: torch.Tensor) -> torch.Tensor:
    """The grid's definition, corner by corner, differentiable in u and the table."""
    levels = []
    for level in range(grid.levels):
        side, stride = int(grid.side[level]), grid.stride[:, level, 0].long()
        x = u * (side - 1)
        cell = x.detach().floor().clamp(0, side - 2)
        total = 0
        for corner in torch.tensor(CORNERS):
            weight = torch.where(corner.bool(), x - cell, 1 - (x - cell)).prod(-1)
            row = ((cell.long() + corner) * stride).sum(-1) & grid.mask[level].long()
            total = total + weight[:, None] * grid.table[row + grid.origin[level].long()]
        levels.append(total)
    return torch.cat(levels, dim=-1)


class TestField:
    def setup_method(self):
        torch.manual_seed(0)
        self.grid = HashGrid(4, 3, 10, coarsest=4, finest=40, scale=1.0).double()
        self.u = torch.rand(64, 3, dtype=torch.double)
        self.u[:2] = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])

    def test_grid_interpolates_its_corners(self):
        assert torch.allclose(self.grid(self.u, None), trilinear(self.grid, self.u))

    def test_dense_levels_do_not_share_rows(self):
        assert self.grid.stride[:, 0, 0].tolist() == [16, 4, 1]
        assert self.grid.stride[0, -1, 0].item() > 40**2

    def test_gradient_to_the_table_is_unbiased(self):
        d_out = torch.randn(64, 12, dtype=torch.double)
        (exact,) = torch.autograd.grad(
            (trilinear(self.grid, self.u) * d_out).sum(), self.grid.table
        )
        generator = torch.Generator().manual_seed(0)
        draws = torch.stack(
            [
                torch.autograd.grad((self.grid(self.u, generator) * d_out).sum(), self.grid.table)[
                    0
                ]
                for _ in range(2000)
            ]
        )
        error = (draws.mean(0) - exact).abs()
        assert (error <= 5 * draws.std(0) / math.sqrt(2000) + 0.01).all()
        assert draws[0].count_nonzero(dim=-1).bool().sum() <= 64 * 4

    def test_pull_is_the_gradient_of_the_interpolation(self):
        u = self.u.clone().requires_grad_()
        d_out = torch.randn(64, 12, dtype=torch.double)
        (expected,) = torch.autograd.grad((trilinear(self.grid, u) * d_out).sum(), u)
        assert torch.allclose(self.grid.pull(self.u, d_out), expected)

    @pytest.mark.parametrize("space", [Contraction(), Frustum([-1, -1, 0.2], [1, 1, 1.0])])
    def test_normals_oppose_the_gradient_of_density(self, space):
        field = Field(FieldConfig(levels=3, log2_rows=10, finest=30), space, {}).double()
        for grid in field.grids():
            torch.nn.init.normal_(grid)
        x = torch.randn(100, 3, dtype=torch.double)
        x[:, 2] = -2 - x[:, 2].abs()
        position = x.clone().requires_grad_()
        hidden = F.relu(field.density_in(trilinear(field.grid, space.warp(position))))
        density = torch.exp(field.density_out(hidden)[:, 0] - 1)
        (gradient,) = torch.autograd.grad(density.sum(), position)
        normals = field.normals(x)
        assert torch.allclose(normals, -F.normalize(gradient, dim=-1), atol=1e-9)
        assert not normals.requires_grad

    def test_compositing_the_hidden_layer_equals_compositing_the_feature(self):
        field = Field(FieldConfig(), Contraction(), {"feature": 5})
        head = field.feature_heads["feature"]
        u, weights = torch.rand(7, 6, 3), torch.rand(7, 6)
        per_sample = head.out(F.relu(head.hidden(head.grid(u.view(-1, 3), None)))).view(7, 6, 5)
        expected = (weights[..., None] * per_sample).sum(1)
        total = (weights[..., None] * head.hidden_layer(u, None)).sum(1)
        assert torch.allclose(head(total, weights.sum(1)), expected, atol=1e-6)


class TestModel:
    def test_resampling_follows_the_weights(self):
        s = torch.linspace(0, 1, 5, dtype=torch.double)[None].expand(3, 5)
        weights = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.double).expand(3, 4)
        jitter = torch.tensor([[0.0], [0.5], [0.999]], dtype=torch.double)
        edges = resample(s, weights, 8, 0.0, jitter)
        assert ((edges >= 0.25) & (edges <= 0.5)).all()
        assert torch.allclose(edges.diff(), torch.full((3, 8), 0.25 / 9, dtype=torch.double))
        padded = resample(s, weights, 400, 0.5, jitter)
        share = ((padded > 0.25) & (padded < 0.5)).double().mean()
        assert share.item() == pytest.approx(0.5, abs=0.01)

    def model(self, scene, **features):
        preset = PRESETS["tiny"][1]
        return make_model(preset.field, preset.sampler, scene.space, features)

    def test_samples_stay_in_order_between_near_and_far(self):
        scene = scenes.load_motorcycle(crop=32)
        generator = torch.Generator().manual_seed(0)
        rays = scene.rays(scene.draw(64, generator))
        for random in (generator, None):
            samples = self.model(scene)(rays, random)
            assert [w.shape[1] for _, w in samples.proposals] == [16, 12]
            assert samples.density.shape == (64, 8)
            for s, w in samples.proposals:
                assert (s.diff() >= 0).all() and (w.sum(-1) <= 1 + 1e-5).all()
            t = samples.t
            assert (samples.s.diff() >= 0).all() and (t.diff() >= 0).all()
            assert (t >= rays.near - 1e-5).all() and (t <= rays.far + 1e-4).all()

    @pytest.mark.parametrize("open_end", [True, False])
    def test_packed_samples_lie_in_occupied_cells(self, ball, open_end):
        scene = scenes.load_scene(ball) if open_end else scenes.load_motorcycle(crop=32)
        generator = torch.Generator().manual_seed(0)
        sampler = SamplerConfig(**OCCUPANCY)
        model = make_model(PRESETS["tiny"][1].field, sampler, scene.space, {})
        model.prepare(0, generator)
        assert model.grid.binaries.all() and len(model.grid.binaries) == (4 if open_end else 1)
        model.grid.binaries[:, :6] = False
        rays = scene.rays(scene.draw(64, generator))
        for random in (generator, None):
            samples = model(rays, random, 8)
            assert torch.equal(samples.offsets, rayfuse.ray_offsets(samples.ray, 64))
            begin, end = samples.intervals()
            middle = (begin + end)[:, None] / 2
            x = rays.origins[samples.ray] + rays.directions[samples.ray] * middle
            assert (x[:, 0] >= model.grid.aabbs[:, [0, 3]].mean(1).min() - 1e-5).all()
            assert (middle >= rays.near[samples.ray]).all()
            assert (middle <= rays.far[samples.ray]).all()
            assert torch.allclose(samples.u, scene.space.warp(x))
            assert len(samples.n) == samples.offsets[8] and len(samples.d) == 8
            assert (samples.s_ends >= samples.s_starts).all()
        assert 1 <= model.rays_per_step(512) < 512

    def test_feature_loss_reaches_density_and_normal_terms_do_not(self):
        """As in F3RM: features through the weights; weights and normals detached for normals."""
        scene = scenes.load_motorcycle(crop=32)
        generator = torch.Generator().manual_seed(0)
        model = self.model(scene, feature=4)
        rays = scene.rays(scene.draw(64, generator))
        samples = model(rays, generator, None)
        rendered = samples.losses(torch.rand(64, 3), None)
        features = model.features(samples, rendered, generator)
        features["feature"].square().mean().backward(retain_graph=True)
        density = model.field.density_out.weight
        assert density.grad is not None and density.grad[0].abs().sum() > 0
        model.zero_grad()
        (rendered.orientation_loss + rendered.predicted_normal_loss).backward()
        assert model.field.normal_out.weight.grad is not None
        assert density.grad is None or not density.grad[0].any()


class TestObjective:
    def setup_method(self):
        torch.manual_seed(0)
        self.w = torch.rand(6, 5, dtype=torch.double)
        self.n = F.normalize(torch.randn(6, 5, 3, dtype=torch.double), dim=-1)
        self.d = F.normalize(torch.randn(6, 3, dtype=torch.double), dim=-1)

    def samples(self, **changes):
        s = torch.linspace(0, 1, 6, dtype=torch.double).expand(6, 6)
        random = DenseSamples(
            density=self.w,
            rgb=torch.rand(6, 5, 3, dtype=torch.double),
            u=torch.rand(6, 5, 3, dtype=torch.double),
            s=s,
            t=s,
            proposals=[(s, self.w / 5) for _ in range(2)],
        )
        return replace(random, **changes)

    def packed(self, samples):
        """The same samples end to end."""
        flat = {name: getattr(samples, name).flatten(0, 1) for name in ("density", "rgb", "u")}
        for name in ("s", "t"):
            edges = getattr(samples, name)
            flat[f"{name}_starts"] = edges[:, :-1].flatten()
            flat[f"{name}_ends"] = edges[:, 1:].flatten()
        rays, count = samples.density.shape
        ray = torch.arange(rays).repeat_interleave(count)
        return PackedSamples(**flat, ray=ray, offsets=torch.arange(rays + 1) * count)

    def batch(self, **changes):
        target = torch.rand(6, 3, dtype=torch.double)
        return replace(Batch(target, None, None, {}, None), **changes)

    def terms(self, samples, batch, features, step=0, **config):
        objective = Objective(ObjectiveConfig(**config))
        return objective(samples, objective.render(samples, batch), features, batch, step)

    def depth_loss(self, samples, w, depth, pred, sigma):
        rendered = samples.render(None)._replace(weights=w, depth=pred)
        return depth_loss(samples, rendered, depth, sigma)

    def test_depth_is_supervised_where_it_is_known(self):
        t = torch.linspace(1, 3, 41, dtype=torch.double).expand(4, 41)
        middle = 0.5 * (t[:, 1:] + t[:, :-1])
        w = torch.rand(4, 40, dtype=torch.double, requires_grad=True)
        rgb = torch.rand(4, 40, 3, dtype=torch.double)
        samples = DenseSamples(density=w, rgb=rgb, u=rgb, s=t, t=t, proposals=[])
        depth = torch.tensor([2.0, torch.nan, 1.5, torch.inf], dtype=torch.double)
        rendered = (w * middle).sum(-1)
        ours = self.depth_loss(samples, w, depth, rendered, 0.11)
        total = 0.0
        for r in (0, 2):
            target = depth[r].item()
            total += (rendered[r].item() / target - 1) ** 2
            for i in range(40):
                low, high = (t[r, i + k].item() / target - 1 for k in (0, 1))
                if low <= 0.11:
                    sides = [math.erf(edge / (0.11 / 3) / math.sqrt(2)) for edge in (low, high)]
                    total += (w[r, i].item() - 0.5 * (sides[1] - sides[0])) ** 2
        assert ours.item() == pytest.approx(total / 2)
        (grad,) = torch.autograd.grad(ours, w, retain_graph=True)
        assert grad.isfinite().all() and not grad[[1, 3]].any()
        packed = self.depth_loss(self.packed(samples), w.flatten(), depth, rendered, 0.11)
        assert torch.allclose(packed, ours)
        assert torch.allclose(torch.autograd.grad(packed, w)[0], grad)

    @pytest.mark.parametrize("dtype, rtol", [(torch.double, 1e-11), (torch.float, 2e-4)], ids=str)
    def test_depth_loss_is_the_plain_formula(self, dtype, rtol):
        """At the width of the band that training has, in 24 intervals a ray."""
        sigma, rays = ObjectiveConfig().depth_sigma, 50
        t = (0.5 + torch.rand(rays, 25, dtype=dtype)).cumsum(-1)
        w = torch.rand(rays, 24, dtype=dtype, requires_grad=True)
        pred = (10 * torch.rand(rays, dtype=dtype)).requires_grad_()
        depth = t[:, -1] * (0.1 + torch.rand(rays, dtype=dtype))
        depth[::5] = torch.nan
        known = depth.isfinite()
        target = torch.where(known, depth, 1)
        begin, end = t[:, :-1] / target[:, None], t[:, 1:] / target[:, None]
        below = [torch.special.ndtr((x - 1) * 3 / sigma) for x in (begin, end)]
        sight = torch.where(begin <= 1 + sigma, (w - (below[1] - below[0])) ** 2, 0).sum(-1)
        each = sight + (pred / target - 1) ** 2
        plain = torch.where(known, each, 0).sum() / known.sum()
        want = torch.autograd.grad(plain, (w, pred))
        rgb = torch.rand(rays, 24, 3, dtype=dtype)
        dense = DenseSamples(density=w, rgb=rgb, u=rgb, s=t, t=t, proposals=[])
        for samples, weights in ((dense, w), (self.packed(dense), w.flatten())):
            ours = self.depth_loss(samples, weights, depth, pred, sigma)
            torch.testing.assert_close(ours, plain, rtol=rtol, atol=0)
            got = torch.autograd.grad(ours, (w, pred))
            torch.testing.assert_close(got, want, rtol=rtol, atol=rtol / rays)

    def test_depth_unknown_everywhere_costs_exactly_nothing(self):
        w = self.w.requires_grad_()
        ours = self.depth_loss(self.samples(), w, torch.full((6,), torch.nan), w.sum(1), 0.1)
        assert ours.item() == 0
        assert not torch.autograd.grad(ours, w)[0].any()

    def test_backgrounds_show_through_both_sides(self):
        dense, background = self.samples(), torch.rand(6, 3, dtype=torch.double)
        alpha = torch.rand(6, 1, dtype=torch.double)
        batch = self.batch(alpha=alpha, background=background)
        plain = dense.render(None)
        through = (1 - plain.accumulation)[:, None]
        for samples in (dense, self.packed(dense)):
            for colour, shown in (
                ("random", background),
                ("last_sample", dense.rgb[:, -1]),
                ("white", torch.ones(6, 3, dtype=torch.double)),
                ("none", None),
            ):
                objective = Objective(ObjectiveConfig(background_color=colour))
                drawn = background if colour == "random" else None
                out = objective.render(samples, replace(batch, background=drawn))
                rgb = plain.rgb if shown is None else plain.rgb + through * shown
                target = batch.rgb if shown is None else batch.rgb + (1 - alpha) * shown
                assert torch.allclose(out.rgb, rgb), colour
                assert torch.allclose(out.rgb_loss, F.mse_loss(rgb, target)), colour

    def test_last_colour_of_a_ray_without_samples_is_black(self):
        packed = self.packed(self.samples())
        assert torch.equal(packed.last_rgb(), packed.rgb[4::5])
        offsets = torch.tensor([0, 0, 10, 30, 30, 30, 30])
        last = replace(packed, offsets=offsets).last_rgb()
        assert torch.equal(last[[1, 2]], packed.rgb[[9, 29]]) and not last[[0, 3, 4, 5]].any()

    def test_defaults_and_names_are_those_of_f3rm(self):
        samples = self.samples(n=self.n, n_pred=self.n.roll(1, 0), d=self.d)
        features = {"feature_dino": self.n[:, 0], "feature_clip": self.n[:, 1]}
        targets = {name: torch.rand_like(value) for name, value in features.items()}
        terms = self.terms(samples, self.batch(features=targets), features)
        assert terms.weights == {
            "rgb_loss": 1.0,
            "distortion_loss": 0.002,
            "interlevel_loss": 1.0,
            "feature_dino_loss": 1e-3,
            "feature_clip_loss": 1e-3,
            "orientation_loss": 1e-4,
            "pred_normal_loss": 1e-3,
        }
        assert set(terms.metrics) == {
            "psnr",
            "distortion",
            "feature_dino_error",
            "feature_clip_error",
        }
        expected = sum(terms.weights[name] * loss for name, loss in terms.losses.items())
        assert torch.allclose(terms.total, expected)
        error = F.mse_loss(features["feature_clip"], targets["feature_clip"])
        assert torch.allclose(terms.losses["feature_clip_loss"], error)
        packed = self.terms(self.packed(self.samples()), self.batch(), {})
        assert [*packed.weights] == ["rgb_loss", "distortion_loss"]

    def test_schedules(self):
        assert get_scheduled_loss_weight(0, 1e-3, 100) == 0
        assert get_scheduled_loss_weight(25, 1e-3, 100) == pytest.approx(2.5e-4)
        assert get_scheduled_loss_weight(100, 1e-3, 100) == 1e-3
        assert get_scheduled_loss_weight(0, 1e-3, 0) == 1e-3
        assert adaptive_feature_weight(0.02, 1.0) == 5e-4
        assert adaptive_feature_weight(0.005, 1.0) == 1e-3
        assert adaptive_feature_weight(0.0005, 1.0) == 2e-3

    def test_schedules_reach_the_weights(self):
        given = (
            self.samples(),
            self.batch(features={"feature": self.n[:, 1]}),
            {"feature": self.n[:, 0]},
        )
        warm = self.terms(*given, step=5, feat_loss_warmup_steps=10)
        assert warm.weights["feature_loss"] == pytest.approx(5e-4)
        adaptive = self.terms(*given, adaptive_feature_weight=True)
        assert adaptive.weights["feature_loss"] == 5e-4


class TestFeatures:
    def test_lattice_positions_match_the_photograph(self):
        """A speck changes the output around its own place, in every layer."""
        trunk = Trunk()
        blank, speck = torch.zeros(97, 97, 3), torch.zeros(97, 97, 3)
        speck[40, 56] = 1.0
        before, after = trunk(blank, {1, 2, 3}), trunk(speck, {1, 2, 3})
        for layer, feature in before.items():
            change = (feature.values - after[layer].values).norm(dim=-1)
            for axis, place in ((0, 40.5), (1, 56.5)):
                count = change.shape[axis]
                at = feature.start[axis] + feature.step[axis] * torch.arange(count)
                centre = (change.sum(1 - axis) * at).sum() / change.sum()
                assert abs(centre.item() - place) < 1.0, layer

    def test_components_are_normalised_on_training_views(self, ball):
        scene = scenes.load_scene(ball)
        values = extract(scene, FeatureConfig(channels=6))["feature"].values
        train = values[scene.train_views]
        assert train.square().mean().item() == pytest.approx(1.0, rel=1e-4)
        assert train.mean((0, 1, 2)).abs().max() < 1e-3
        variance = train.var((0, 1, 2))
        assert (variance.diff() <= 0).all()
        # held-out photographs have no say in the components
        scene.rgb[scene.test_views] = 0.0
        other = extract(scene, FeatureConfig(channels=6))["feature"].values
        assert torch.equal(other[scene.train_views], train)

    def test_dinoclip_has_two_heads(self, ball):
        maps = extract(scenes.load_scene(ball), FeatureConfig("DINOCLIP", channels=4))
        assert set(maps) == {"feature_dino", "feature_clip"}
        assert not torch.equal(maps["feature_dino"].values, maps["feature_clip"].values)

    def test_lookup_is_bilinear_and_clamped(self):
        scene = scenes.load_motorcycle(crop=8)
        values = torch.arange(2.0 * 2 * 2).view(2, 2, 2, 1)
        feature = FeatureMap(values, (2.0, 2.0), (4.0, 4.0))
        pixels = torch.tensor([0, 3 * 8 + 4, 64 + 63])  # a corner, near the middle, the far corner
        x, y = (4.5 - 2) / 4, (3.5 - 2) / 4
        expected = torch.tensor([[0.0], [x + 2 * y], [7.0]])
        assert torch.allclose(feature.at(scene, pixels), expected)

    def test_files_take_the_place_of_the_network(self, ball, tmp_path):
        scene = scenes.load_scene(ball)
        torch.manual_seed(0)
        arrays = torch.randn(24, 5, 5, 3)
        for name, array in zip(scene.names, arrays, strict=True):
            np.save(tmp_path / f"{name}.npy", array.numpy())
        ours = extract(scene, FeatureConfig(files=tmp_path, channels=3))["feature"]
        assert ours.step == (8.0, 8.0)
        flat = arrays[scene.train_views].view(-1, 3)
        spread = (arrays - flat.mean(0)).view(-1, 3)
        ours, spread = ours.values.view(-1, 3).double(), spread.double()
        # principal components keep inner products, up to the one scale
        scale = spread.view(24, -1)[scene.train_views].square().mean()
        assert torch.allclose(ours @ ours.T, spread @ spread.T / scale, atol=1e-5)

    def test_missing_weights_say_what_to_install(self, ball, monkeypatch):
        def missing(name):
            raise trainer_metadata.PackageNotFoundError(name)

        import importlib.metadata as trainer_metadata

        monkeypatch.setattr(trainer_metadata, "files", missing)
        with pytest.raises(InputError, match="pip install --no-deps stlpips-pytorch"):
            extract(scenes.load_scene(ball), FeatureConfig())


def state_of(made: trainer.Trainer) -> dict[str, torch.Tensor]:
    tensors = {f"model.{k}": v for k, v in made.model.state_dict().items()}
    for number, state in made.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{number}.{k}": torch.as_tensor(v) for k, v in state.items()}
    return tensors | {"generator": made.generator.get_state()}


@pytest.fixture(scope="module")
def finished(ball, tmp_path_factory):
    """A finished run on the ball with features and every other term."""
    run_dir = tmp_path_factory.mktemp("runs") / "ball"
    assert run(ball, "--preset", "tiny", "--steps", 150, "--output", run_dir) == 0
    return run_dir


class TestTraining:
    def test_losses_fall(self, finished):
        records = log_of(finished)
        assert [record["step"] for record in records] == list(range(1, 151))
        for term in ("rgb_loss", "distortion_loss", "orientation_loss", "pred_normal_loss"):
            values = [record["losses"][term] for record in records]
            assert np.mean(values[-20:]) < 0.6 * np.mean(values[:20]), term
        assert all(math.isfinite(record["total"]) for record in records)

    def test_run_directory_holds_what_the_report_needs(self, finished):
        config = json.loads((finished / "config.json").read_text())
        assert config["objective"]["feat_loss_weight"] == 1e-3
        assert config["command"].startswith("rayfuse") and "torch" in config["versions"]
        record = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
        assert set(record["losses"]) == set(record["weighted"]) == set(record["weights"])
        assert set(record["lr"]) == {"grid", "proposal", "mlp"}
        assert record["total"] == pytest.approx(sum(record["weighted"].values()), rel=1e-5)
        evaluation = json.loads((finished / "evaluation.json").read_text())
        assert (evaluation["held_out"], evaluation["baseline"]) == ("views", None)
        assert evaluation["psnr"] == np.mean([view["psnr"] for view in evaluation["views"]])
        images = evaluation["views"][0]["images"]
        assert {"photo", "render", "error", "depth", "normal", "predicted_normal"} <= set(images)
        assert {"accumulation", "feature", "feature_target"} <= set(images)
        for path in images.values():
            assert Image.open(finished / path).size == (40, 40)
        assert (finished / "report.html").stat().st_size > 10_000

    def test_profile_accounts_for_the_step(self, finished):
        profile = json.loads((finished / "profile.json").read_text())
        parts = {part["name"]: part for part in profile["parts"]}
        assert {"rays", "proposals", "density", "colour", "losses", "optimiser"} <= set(parts)
        for name in ("proposals", "density", "colour", "features", "losses"):
            assert parts[name]["forward_ms"] > 0 and parts[name]["backward_ms"] > 0, name
        ops = {op["op"]: op for op in profile["ops"]}
        fused = {"ray_weights", "composite_rays", "render_features", "distortion_loss"}
        fused |= {"interlevel_loss", "normal_losses", "feature_distillation_loss"}
        for name in fused:
            assert ops[name]["backend"] in ("cpu", "ref")
            assert ops[name]["backward_ms"] > 0, name

    def test_fused_kernels_train_as_the_reference_does(self, finished):
        comparison = json.loads((finished / "compare.json").read_text())
        assert comparison["steps"] == 5
        record = log_of(finished)[0]
        assert set(comparison["losses"]) == {*record["losses"], "total"}
        for term, sides in comparison["losses"].items():
            assert len(sides["reference"]) == len(sides["fused"]) == 5
            first = sides["reference"][0]
            assert sides["fused"][0] == pytest.approx(first, rel=1e-5, abs=1e-9), term
            # later a rounding can move an edge into the next bin of an envelope
            assert sides["fused"] == pytest.approx(sides["reference"], rel=2e-2), term
        # the comparison leaves no trace in the run
        assert comparison["losses"]["rgb_loss"]["fused"][0] == record["losses"]["rgb_loss"]
        for figure in ("step_ms", "extra_memory_mb"):
            assert all(value > 0 for value in comparison[figure].values())
        ran = {side: {op["backend"] for op in ops} for side, ops in comparison["ops"].items()}
        assert "ref" in ran["reference"]
        assert "ref" not in ran["fused"] or rayfuse.backends()["cpu"] != "available"

    def test_held_out_views_resemble_the_photographs(self, finished, ball):
        evaluation = json.loads((finished / "evaluation.json").read_text())
        photos = scenes.load_scene(ball).rgb
        blank = -10 * math.log10((photos - photos.mean(0)).square().mean().item())
        assert evaluation["psnr"] > blank + 3

    @pytest.mark.parametrize("sampler", [PRESETS["tiny"][1].sampler, SamplerConfig(**OCCUPANCY)])
    def test_resume_continues_bit_for_bit(self, ball, tmp_path, sampler):
        scene = scenes.load_scene(ball)
        features = extract(scene, FeatureConfig(channels=4))
        config = tiny(steps=16, sampler=sampler)
        whole = trainer.Trainer(config, scene, features)
        half = trainer.Trainer(config, scene, features)
        for _ in range(16):
            whole.train_step()
        for _ in range(8):
            half.train_step()
        runs.save_checkpoint(tmp_path / "checkpoint.pt", half.state())
        del half
        torch.rand(5)  # the global generator must not matter
        again = trainer.Trainer(config, scene, features)
        again.load(runs.read_checkpoint(tmp_path / "checkpoint.pt", trainer.FORMAT))
        for _ in range(8):
            again.train_step()
        expected, ours = state_of(whole), state_of(again)
        assert expected.keys() == ours.keys()
        different = [name for name in expected if not torch.equal(expected[name], ours[name])]
        assert different == []

    def test_an_occupancy_grid_trains_too(self, ball, tmp_path):
        run_dir = tmp_path / "run"
        arguments = ["--preset", "tiny", "--steps", 70, "--compare-steps", 0]
        for name, value in OCCUPANCY.items():
            arguments += [f"--sampler.{name.replace('_', '-')}", value]
        assert run(ball, *arguments, "--features.channels", 4, "--output", run_dir) == 0
        records = log_of(run_dir)
        assert "interlevel_loss" not in records[0]["losses"] and "proposal" not in records[0]["lr"]
        losses = [record["losses"]["rgb_loss"] for record in records]
        assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
        metrics = [record["metrics"] for record in records]
        assert metrics[0]["occupied_share"] == 1 and metrics[-1]["occupied_share"] < 0.8
        assert metrics[-1]["samples_per_ray"] < 0.5 * metrics[0]["samples_per_ray"]
        ops = {op["op"] for op in json.loads((run_dir / "profile.json").read_text())["ops"]}
        assert {"packed_ray_weights", "packed_composite_rays", "packed_normal_losses"} <= ops
        assert "packed_distortion_loss" in ops and "packed_render_features" in ops
        saved = runs.read_checkpoint(run_dir / "checkpoint.pt", trainer.FORMAT)["model"]
        assert saved["grid.binaries"].float().mean().item() == metrics[-1]["occupied_share"]

    def test_rays_may_meet_nothing(self):
        scene = scenes.load_motorcycle(crop=64)
        features = extract(scene, FeatureConfig(channels=4))
        one = trainer.Trainer(tiny(sampler=SamplerConfig(**OCCUPANCY)), scene, features)
        one.step = 1  # in which the grid is not looked at
        terms = one.train_step()
        assert terms.metrics["samples_per_ray"] == 0
        assert all(loss.isfinite() for loss in terms.losses.values())
        view = render_view(one.model, one.objective, scene, 0)
        assert not view.rgb.any() and not view.depth.any()

    def test_other_seeds_give_other_runs(self, ball):
        scene = scenes.load_scene(ball)
        made = [trainer.Trainer(tiny(seed=seed), scene, {}) for seed in (0, 0, 1)]
        totals = [float(one.train_step().total.detach()) for one in made]
        assert totals[0] == totals[1] != totals[2]

    def test_rates_warm_up_then_fall_to_their_share(self, ball):
        one = trainer.Trainer(tiny(steps=40), scenes.load_scene(ball), {})
        rates = []
        for _ in range(40):
            one.train_step()
            rates.append(one.lr["grid"])
        assert rates[0] < 0.3 * max(rates)
        assert rates.index(max(rates)) <= 5
        assert rates[-1] == pytest.approx(0.02 * 0.05, rel=0.2)

    def test_interrupt_saves_and_resume_finishes_the_same_run(self, ball, tmp_path):
        """Ctrl-C at a step, then --resume: the log and the result are those of one run."""
        arguments = ["--preset", "tiny", "--features.feature-type", "NONE", "--steps", 12]
        arguments += ["--compare-steps", 0]
        assert run(ball, *arguments, "--output", tmp_path / "whole") == 0
        with interrupted_after(trainer.Trainer, 7):
            assert run(ball, *arguments, "--output", tmp_path / "parts") == 130
        stopped = runs.read_checkpoint(tmp_path / "parts" / "checkpoint.pt", trainer.FORMAT)
        assert stopped["step"] == 7
        assert run("--resume", tmp_path / "parts") == 0
        logs = [
            [
                {key: record[key] for key in ("step", "losses", "lr")}
                for record in log_of(tmp_path / name)
            ]
            for name in ("whole", "parts")
        ]
        assert logs[0] == logs[1]
        results = [
            json.loads((tmp_path / name / "evaluation.json").read_text())["psnr"]
            for name in ("whole", "parts")
        ]
        assert results[0] == results[1]

    def test_motorcycle_trains_with_every_term(self, monkeypatch, tmp_path):
        crop = scenes.load_motorcycle(crop=64)
        monkeypatch.setattr(trainer, "load_scene", lambda *_: crop)
        run_dir = tmp_path / "run"
        assert run("--preset", "tiny", "--steps", 100, "--output", run_dir) == 0
        records = log_of(run_dir)
        assert set(records[0]["losses"]) == {
            "rgb_loss",
            "distortion_loss",
            "interlevel_loss",
            "feature_loss",
            "orientation_loss",
            "pred_normal_loss",
            "depth_loss",
        }
        for term, share in {"rgb_loss": 0.5, "feature_loss": 0.3, "depth_loss": 0.95}.items():
            values = [record["losses"][term] for record in records]
            assert np.mean(values[-10:]) < share * np.mean(values[:10]), term
        evaluation = json.loads((run_dir / "evaluation.json").read_text())
        assert evaluation["held_out"] == "pixels"
        assert evaluation["baseline"]["psnr"] > 15

    def test_a_diverged_run_stops_with_one_line(self, ball, tmp_path, capfd):
        code = run(
            *(ball, "--preset", "tiny", "--features.feature-type", "NONE"),
            *("--optimiser.mlp-lr", "nan", "--output", tmp_path / "run"),
        )
        assert code == 1
        assert capfd.readouterr().err.strip().startswith("rayfuse train: the loss is nan at step")


@contextmanager
def interrupted_after(kind: type, step: int):
    """Ctrl-C after a step of trainers of this kind."""
    train_step = kind.train_step

    def interrupted(self):
        terms = train_step(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "train_step", interrupted)
        yield


def log_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def rejected(capfd, *arguments) -> str:
    """The one line on stderr of a call that must fail with code 2."""
    assert run(*arguments) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("rayfuse train: ") and " must " in lines[0], lines[0]
    return lines[0]


class TestBadInput:
    @pytest.fixture(autouse=True)
    def in_empty_folder(self, tmp_path, monkeypatch):
        """Whatever fails must leave no run behind."""
        folder = tmp_path / "cwd"
        folder.mkdir()
        monkeypatch.chdir(folder)
        yield
        assert list(folder.iterdir()) == []

    def test_missing_folder(self, capfd, tmp_path):
        assert "existing folder" in rejected(capfd, tmp_path / "nowhere")

    def test_folder_without_poses(self, capfd, tmp_path):
        assert "must hold transforms.json" in rejected(capfd, tmp_path / "cwd")

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"frames": []}', '{"frames": [3]}', "\x00"])
    def test_unusable_json(self, capfd, own_ball, text):
        (own_ball[0] / "transforms.json").write_text(text)
        assert "transforms.json" in rejected(capfd, own_ball[0])

    @pytest.mark.parametrize(
        ("pose", "rule"),
        [
            (None, "must have a 'transform_matrix'"),
            ("x", "must be 4 x 4 numbers"),
            ([[1, 0, 0, 0]] * 2, "must be 4 x 4 numbers"),
            ([[float("nan"), 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "must be finite"),
            ([[0, 0, 0, 1]] * 4, "must be invertible"),
        ],
    )
    def test_bad_pose(self, capfd, own_ball, pose, rule):
        folder, content, store = own_ball
        if pose is None:
            del content["frames"][1]["transform_matrix"]
        else:
            content["frames"][1]["transform_matrix"] = pose
        store()
        assert rule in rejected(capfd, folder)

    @pytest.mark.parametrize(
        ("setting", "value", "rule"),
        [
            ("camera_model", "OPENCV_FISHEYE", "must be one of OPENCV"),
            ("is_fisheye", True, "must be one of OPENCV"),
            ("fl_x", None, "fl_x of 000.png must be a finite number"),
            ("fl_x", 0, "must give fl_x or camera_angle_x"),
            ("k1", "a", "k1 of 000.png must be a finite number"),
            ("w", 99, "must be 99 x 16"),
        ],
    )
    def test_bad_camera(self, capfd, own_ball, setting, value, rule):
        folder, content, store = own_ball
        content[setting] = value
        store()
        assert rule in rejected(capfd, folder)

    def test_most_images_missing(self, capfd, own_ball):
        for number in (1, 2, 3):
            (own_ball[0] / "images" / f"{number:03d}.png").unlink()
        line = rejected(capfd, own_ball[0])
        assert "must exist, got 3 of 4 missing" in line and "001.png" in line

    def test_truncated_image(self, capfd, own_ball):
        path = own_ball[0] / "images" / "002.png"
        path.write_bytes(path.read_bytes()[:60])
        assert "002.png must be readable" in rejected(capfd, own_ball[0])

    def test_images_of_different_sizes(self, capfd, own_ball):
        folder, content, store = own_ball
        del content["w"], content["h"]
        store()
        Image.new("RGB", (16, 17)).save(folder / "images" / "003.png")
        assert "must be 16 x 16 as 000.png is, got 16 x 17" in rejected(capfd, folder)

    def test_bad_values(self, capfd, own_ball):
        folder = own_ball[0]
        assert "at most 16" in rejected(capfd, folder, "--downscale", 17)
        assert "at least 1" in rejected(capfd, folder, "--downscale", -1)
        assert "at least 1" in rejected(capfd, folder, "--steps", 0)
        assert "one of demo" in rejected(capfd, folder, "--preset", "huge")
        assert "device must be available" in rejected(capfd, folder, "--device", "abacus")
        assert "32 pixels" in rejected(capfd, folder)

    def test_an_existing_run_is_never_overwritten(self, capfd, own_ball, tmp_path):
        run_dir = tmp_path / "kept"
        run_dir.mkdir()
        (run_dir / "precious").write_text("x")
        line = rejected(capfd, own_ball[0], "--output", run_dir)
        assert "new or empty folder" in line
        assert [path.name for path in run_dir.iterdir()] == ["precious"]

    @pytest.mark.parametrize("damage", ["none", "text", "truncated", "foreign", "unknown"])
    def test_bad_checkpoint(self, capfd, ball, tmp_path, damage):
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        path = run_dir / "checkpoint.pt"
        made = trainer.Trainer(tiny(scene=ball), scenes.load_scene(ball), {})
        if damage == "text":
            path.write_text("not a checkpoint")
        elif damage == "truncated":
            runs.save_checkpoint(path, made.state())
            path.write_bytes(path.read_bytes()[:1000])
        elif damage == "foreign":
            torch.save({"pipeline": {}, "step": 3}, path)
        elif damage == "unknown":
            state = made.state()
            state["config"]["from_the_future"] = 1
            torch.save(state, path)
        before = path.read_bytes() if path.exists() else None
        assert "checkpoint" in rejected(capfd, "--resume", run_dir)
        assert (path.read_bytes() if path.exists() else None) == before
        assert len(list(run_dir.iterdir())) == (0 if damage == "none" else 1)

    def test_checkpoint_of_another_scene(self, capfd, ball, own_ball, tmp_path):
        made = trainer.Trainer(tiny(scene=own_ball[0]), scenes.load_scene(ball), {})
        (tmp_path / "run").mkdir()
        runs.save_checkpoint(tmp_path / "run" / "checkpoint.pt", made.state())
        assert "must be of the scene" in rejected(capfd, "--resume", tmp_path / "run")

    def test_feature_files(self, capfd, ball, tmp_path):
        folder = tmp_path / "features"
        arguments = (ball, "--preset", "tiny", "--features.files", folder)
        assert "existing folder" in rejected(capfd, *arguments)
        folder.mkdir()
        assert "must hold 000.npy or 000.pt" in rejected(capfd, *arguments)
        np.save(folder / "000.npy", np.zeros((4, 4)))
        assert "must hold finite values [h, w, C]" in rejected(capfd, *arguments)
        (folder / "000.npy").write_bytes(b"broken")
        assert "must be a readable array" in rejected(capfd, *arguments)


class TestCommandLine:
    def test_presets_start_from_the_defaults_of_nerfstudio(self):
        nerfacto = PRESETS["nerfacto"][1].sampler
        assert nerfacto == SamplerConfig()
        assert nerfacto.num_proposal_samples_per_ray == (256, 96)
        assert nerfacto.num_nerf_samples_per_ray == 48

    def test_preset_follows_the_scene_and_options_override_it(self, tmp_path):
        assert parse([]).preset == "demo"
        assert parse([str(tmp_path)]).preset == "photos"
        config = parse(["--preset", "tiny", "--objective.depth-loss-mult", "0.5"])
        assert (config.preset, config.objective.depth_loss_mult) == ("tiny", 0.5)
        assert config.steps == PRESETS["tiny"][1].steps

    def test_configuration_survives_json(self, tmp_path):
        for name, (_, preset) in PRESETS.items():
            config = replace(preset, preset=name, scene=tmp_path)
            assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config

    def test_help_and_unknown_commands(self, capsys):
        assert cli.main(["--help"]) == 0
        assert "train a feature field" in capsys.readouterr().out
        assert cli.main(["fly"]) == 2
        assert "got fly" in capsys.readouterr().err
        with pytest.raises(SystemExit) as left:
            cli.main(["train", "--help"])
        assert left.value.code == 0
        assert "--objective.feat-loss-weight" in capsys.readouterr().out

    def test_the_package_needs_no_extra_and_a_missing_one_is_named(self):
        """A process in which no extra can be imported: the package loads, train says what to do."""
        code = (
            "import sys\n"
            "for name in ('tyro', 'rich', 'numpy', 'matplotlib', 'PIL', 'skimage', 'torchmetrics',"
            " 'jinja2'):\n"
            "    sys.modules[name] = None\n"
            "import rayfuse.cli\n"
            "sys.exit(rayfuse.cli.main(['train']))\n"
        )
        made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert made.returncode == 2
        assert "pip install 'rayfuse[train]'" in made.stderr.strip().splitlines()[-1]


@pytest.mark.slow
class TestQuality:
    def test_demo_beats_its_baseline(self, tmp_path):
        assert run("--output", tmp_path / "run") == 0
        evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        assert evaluation["psnr"] >= 26.5
        assert evaluation["psnr"] > evaluation["baseline"]["psnr"]

    @pytest.mark.skipif(not FOX.is_dir(), reason="the fox scene is not beside the repository")
    def test_fox_at_one_eighth(self, tmp_path):
        assert run(FOX, "--downscale", 8, "--output", tmp_path / "run") == 0
        evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        assert evaluation["held_out"] == "views"
        assert evaluation["psnr"] >= 28.0


def test_rendering_is_deterministic_and_covers_the_frame():
    scene = scenes.load_motorcycle(crop=24)
    preset = PRESETS["tiny"][1]
    model = make_model(preset.field, preset.sampler, scene.space, {"feature": 4})
    objective = Objective(ObjectiveConfig())
    views = [render_view(model, objective, scene, 1) for _ in range(2)]
    assert views[0].rgb.shape == (24, 24, 3)
    assert torch.equal(views[0].rgb, views[1].rgb)
    assert views[0].heads["feature"].shape == (24, 24, 4)
