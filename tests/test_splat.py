"""`rayfuse splat` and `rayfuse view`: cameras, points, files, training and the command line."""

import json
import math
import urllib.request
from dataclasses import fields, replace

import gsplat
import numpy as np
import pytest
import torch
from PIL import Image

from rayfuse import cli
from rayfuse.compat import gsplat as compat
from rayfuse.splat import cameras, trainer, view
from rayfuse.splat import sweep as planes
from rayfuse.splat.config import PRESETS, SplatConfig, parse
from rayfuse.splat.gaussians import (
    FLAT_HARMONIC,
    Camera,
    Gaussians,
    from_points,
    read_ply,
    read_points,
    write_ply,
)
from rayfuse.train import InputError
from rayfuse.train import run as runs
from rayfuse.train import scene as scenes
from rayfuse.train.options import from_json, to_json
from rayfuse.train.space import Contraction
from test_train import interrupted_after, log_of, write_scene


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene") / "ball"
    write_scene(folder, views=24)
    return folder


def tiny(**changes) -> SplatConfig:
    return replace(PRESETS["tiny"][1], preset="tiny", **changes)


def run(*arguments: object) -> int:
    return cli.main(["splat", *map(str, arguments)])


def gaussians(count=40, degree=2, seed=0) -> Gaussians:
    """Some in front of a camera at the origin that looks along z."""
    torch.manual_seed(seed)
    made = from_points(
        torch.rand(count, 3) + torch.tensor([-0.5, -0.5, 1.5]), torch.rand(count, 3), degree
    )
    made.quats += 0.5 * torch.randn(count, 4)
    made.scales += 0.5 * torch.randn(count, 3)
    made.opacities += torch.randn(count)
    made.shN += 0.1 * torch.randn_like(made.shN)
    return made


def camera(width=37, height=29) -> Camera:
    K = torch.tensor([[40.0, 0, 0.5 * width], [0, 42.0, 0.5 * height], [0, 0, 1]])
    return Camera(torch.eye(4), K, width, height)


def colour_of(rays: torch.Tensor) -> torch.Tensor:
    """Of directions [..., 2] at depth 1, smooth."""
    x, y = rays.unbind(-1)
    return torch.stack([0.5 + 0.4 * x, 0.5 + 0.4 * y, 0.5 + 0.3 * x * y], -1)


def bent_scene(k1: float) -> scenes.Scene:
    """One photograph, through a bent lens, of a world whose colour depends on the direction."""
    row = torch.tensor([50.0, 52.0, 31, 23.5, k1, 0, 0, 0, 0.01, 0], dtype=torch.float64)
    plane = scenes._pixel_plane(row, 64, 48, 1)
    return scenes.Scene(
        name="bent",
        names=["one"],
        rgb=colour_of(plane)[None],
        alpha=None,
        poses=torch.eye(4)[None, :3],
        plane=plane[None],
        camera=torch.zeros(1, dtype=torch.long),
        space=Contraction(),
        near=0.2,
        far=100.0,
        held_out=torch.zeros(1, dtype=torch.bool),
        depth=1 + plane[None, ..., 0] ** 2,
    )


class TestCameras:
    @pytest.mark.parametrize("k1", [0.1, -0.1])
    def test_photographs_of_bent_lenses_are_resampled_to_straight_rays(self, k1):
        bent = bent_scene(k1)
        straight = cameras.undistorted(bent)
        steps = straight.plane[0].diff(dim=1)[..., 0], straight.plane[0].diff(dim=0)[..., 1]
        for step in steps:
            torch.testing.assert_close(step, step.mean().expand_as(step), rtol=1e-3, atol=0)
        # bilinear interpolation of a smooth image
        torch.testing.assert_close(straight.rgb[0], colour_of(straight.plane[0]), rtol=0, atol=2e-4)
        depth = 1 + straight.plane[0, ..., 0] ** 2
        torch.testing.assert_close(straight.depth[0], depth, rtol=0, atol=2e-4)
        assert straight.plane.amax() <= bent.plane.amax()

    def test_straight_lenses_are_left_alone(self):
        straight = bent_scene(0.0)
        straight = cameras.undistorted(straight)
        assert cameras.undistorted(straight) is straight

    def test_a_point_on_a_ray_is_seen_at_its_pixel(self, ball):
        scene = scenes.load_scene(ball)
        index = torch.arange(0, scene.rgb[..., 0].numel(), 997)
        rays = scene.rays(index)
        points = rays.origins + torch.linspace(0.5, 3, len(index))[:, None] * rays.directions
        seen_by = cameras.cameras(scene)
        for point, at in zip(points, index.tolist(), strict=True):
            view, pixel = divmod(at, scene.pixels)
            seen = seen_by[view].viewmat @ torch.cat([point, torch.ones(1)])
            x, y, _ = seen_by[view].K @ (seen[:3] / seen[2])
            row, column = divmod(pixel, 40)
            assert seen[2] > 0
            assert (x.item(), y.item()) == pytest.approx((column + 0.5, row + 0.5), abs=2e-3)

    def test_pixels_are_lifted_by_their_depth_and_what_is_held_out_is_not(self):
        scene = scenes.load_motorcycle(crop=48)
        points, rgb = cameras.starting_points(scene, 7, torch.Generator())
        # only the left photograph has depth
        trained = (~scene.held_out[0]).flatten()
        assert len(points) == trained.sum()
        torch.testing.assert_close(rgb, scene.rgb[0].view(-1, 3)[trained])
        depth = scene.depth[0].flatten()[trained]
        distance = (points - scene.poses[0, :, 3]).norm(dim=1)
        known = depth.isfinite()
        torch.testing.assert_close(distance[known], depth[known])
        assert distance.isfinite().all() and distance[~known].max() <= depth[known].max() + 1e-5

    def test_without_depth_points_lie_on_rays_of_training_views(self, ball):
        scene = scenes.load_scene(ball)
        points, rgb = cameras.starting_points(scene, 200, torch.Generator().manual_seed(1))
        # of the ball, which is most of no photograph
        assert 10 < len(points) < 100 and rgb.shape == points.shape
        assert (rgb.amax(1) > 0.1).all()
        trained = scene.poses[scene.train_views, :, 3]
        nearest = torch.cdist(points, trained).amin(1)
        assert nearest.min() > 0 and nearest.max() <= cameras.FARTHEST


def wall() -> tuple[torch.Tensor, list[Camera], torch.Tensor]:
    """Photographs of five cameras in a row before a slanted wall with a pattern, and of one that
    looks away; the cameras; and the depth of the wall."""
    h, w, focal = 48, 64, 60.0
    K = torch.tensor([[focal, 0, w / 2], [0, focal, h / 2], [0, 0, 1]])
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    at_one = torch.stack([(x - w / 2) / focal, (y - h / 2) / focal, torch.ones_like(x)], -1)
    photos, seen_by, depths = [], [], []
    for number in range(6):
        viewmat = torch.eye(4)
        viewmat[0, 3] = -0.1 * number
        if number == 5:
            viewmat = viewmat * torch.tensor([-1.0, 1, -1, 1])[:, None]
        # z = 2 + x / 2
        depth = (2 + 0.05 * number) / (1 - 0.5 * at_one[..., 0])
        u, v = (depth[..., None] * at_one)[..., :2].unbind(-1)
        u = u + 0.1 * number
        waves = [(9 * u + 5 * v).sin(), (13 * v - 7 * u).sin(), (17 * u * v + 11 * u).sin()]
        photos.append(0.5 + 0.5 * torch.stack(waves, -1))
        seen_by.append(Camera(viewmat, K, w, h))
        depths.append(depth)
    return torch.stack(photos), seen_by, torch.stack(depths)


class TestSweep:
    def test_finds_the_depth_of_what_others_see_as_well(self):
        photos, seen_by, depths = wall()
        found = planes.sweep(photos, seen_by, 1.0, 8.0)
        assert found[5].isnan().all()
        known = found[:5].isfinite()
        assert known.float().mean() > 0.5
        step = (1 - 1 / 8.0) / (planes.PLANES - 1)
        error = (1 / found[:5] - 1 / depths[:5])[known].abs()
        assert error.median() <= step and error.quantile(0.95) <= 3 * step

    def test_drops_what_others_do_not_confirm(self, monkeypatch):
        photos, seen_by, depths = wall()
        depths[0, 10:20, 30:40] *= 0.7
        monkeypatch.setattr(planes, "_find", lambda view, *_: depths[view])
        found = planes.sweep(photos, seen_by, 1.0, 8.0)[0]
        assert found[10:20, 30:40].isnan().all()
        assert found[20:, 30:40].isfinite().all()


class TestPicture:
    @pytest.mark.parametrize("background", [None, (0.2, 0.5, 0.9)])
    def test_is_what_gsplat_makes(self, background):
        made, seen_by = gaussians(), camera()
        leaves = [getattr(made, f.name).requires_grad_() for f in fields(made)]
        behind = None if background is None else torch.tensor(background)
        compat.install()
        try:
            theirs, alpha, _ = gsplat.rasterization(
                *(made.means, made.quats, made.scales.exp(), made.opacities.sigmoid()),
                torch.cat([made.sh0, made.shN], 1),
                *(seen_by.viewmat[None], seen_by.K[None], seen_by.width, seen_by.height),
                sh_degree=2,
                render_mode="RGB+ED",
                packed=False,
                backgrounds=None if behind is None else behind[None],
            )
        finally:
            compat.uninstall()
        ours = made.picture(seen_by, behind)
        torch.testing.assert_close(ours.rgb, theirs[0, ..., :3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.alpha, alpha[0, ..., 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.depth, theirs[0, ..., 3], rtol=1e-4, atol=1e-4)
        assert 0.1 < ours.alpha.mean() < 0.999
        g = torch.rand_like(ours.rgb)
        expected = torch.autograd.grad((theirs[0, ..., :3] * g).sum(), leaves, retain_graph=True)
        for leaf, grad in zip(
            torch.autograd.grad((ours.rgb * g).sum(), leaves), expected, strict=True
        ):
            torch.testing.assert_close(leaf, grad, rtol=1e-3, atol=1e-4)

    def test_only_harmonics_up_to_the_degree_count(self):
        made = gaussians()
        flat = replace(made, shN=torch.zeros_like(made.shN))
        torch.testing.assert_close(made.picture(camera(), degree=0).rgb, flat.picture(camera()).rgb)
        assert not torch.equal(made.picture(camera()).rgb, flat.picture(camera()).rgb)


class TestPly:
    def test_comes_back_as_it_went(self, tmp_path):
        made = gaussians(degree=3)
        write_ply(tmp_path / "a.ply", made)
        read = read_ply(tmp_path / "a.ply")
        made.quats /= made.quats.norm(dim=1, keepdim=True)
        for f in fields(made):
            torch.testing.assert_close(
                getattr(read, f.name), getattr(made, f.name), rtol=0, atol=1e-7
            )
        assert read.degree == 3
        assert [path.name for path in tmp_path.iterdir()] == ["a.ply"]

    @pytest.mark.parametrize("degree", [0, 2])
    def test_is_the_one_that_gsplat_writes(self, tmp_path, degree):
        made = gaussians(degree=degree)
        made.quats /= made.quats.norm(dim=1, keepdim=True)
        write_ply(tmp_path / "ours.ply", made)
        gsplat.export_splats(
            *(made.means, made.scales, made.quats, made.opacities, made.sh0, made.shN),
            save_to=str(tmp_path / "theirs.ply"),
        )
        ours, theirs = read_ply(tmp_path / "ours.ply"), read_ply(tmp_path / "theirs.ply")
        for f in fields(made):
            torch.testing.assert_close(getattr(ours, f.name), getattr(theirs, f.name))

    def test_points_with_and_without_colours(self, tmp_path):
        header = "ply\nformat ascii 1.0\nelement vertex 1\n"
        place = "".join(f"property float {name}\n" for name in "xyz")
        rgb = "".join(f"property uchar {name}\n" for name in ("red", "green", "blue"))
        path = tmp_path / "points.ply"
        path.write_text(f"{header}{place}{rgb}end_header\n1 2 3 255 0 51\n")
        points, colours = read_points(path)
        assert points.tolist() == [[1, 2, 3]]
        torch.testing.assert_close(colours, torch.tensor([[1.0, 0.0, 0.2]]))
        path.write_text(f"{header}{place}end_header\n1 2 3\n")
        assert read_points(path)[1].tolist() == [[0.5] * 3]

    @pytest.mark.parametrize(
        "damage, rule",
        [
            (lambda raw: raw[:-10], "must be a whole .ply"),
            (lambda raw: raw[:40], "must be a whole .ply"),
            (lambda raw: b"", "must be a whole .ply"),
            (
                lambda raw: raw.replace(b"opacity", b"opacify"),
                "must hold Gaussians, got no opacity",
            ),
            (lambda raw: raw.replace(b"f_rest_8", b"f_more_8"), "must have f_rest of a degree"),
            (lambda raw: raw[:-4] + b"\0\0\xc0\x7f", "must be finite"),
        ],
        ids=["cut", "header cut", "empty", "no opacity", "no such degree", "NaN"],
    )
    def test_a_damaged_file_is_one_clear_error(self, tmp_path, damage, rule):
        path = tmp_path / "a.ply"
        write_ply(path, gaussians(degree=1))
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(InputError, match=rule):
            read_ply(path)

    def test_points_must_be_enough_and_finite(self):
        with pytest.raises(InputError, match="points must be at least 4, got 3"):
            from_points(torch.rand(3, 3), torch.rand(3, 3), 0)
        with pytest.raises(InputError, match="points must be finite"):
            from_points(torch.full((5, 3), math.nan), torch.rand(5, 3), 0)

    def test_first_gaussians_have_the_colours_of_points_and_reach_their_neighbours(self):
        grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3)
        rgb = torch.rand(64, 3)
        made = from_points(grid, rgb, 1)
        torch.testing.assert_close(made.sh0[:, 0] * FLAT_HARMONIC + 0.5, rgb)
        torch.testing.assert_close(made.scales.exp(), torch.ones(64, 3))
        # points in one place
        assert from_points(torch.zeros(5, 3), torch.rand(5, 3), 0).scales.isfinite().all()


def state_of(made: trainer.Trainer) -> dict[str, torch.Tensor]:
    tensors = {name: p.detach() for name, p in made.parameters.items()}
    for name, optimiser in made.optimisers.items():
        state = optimiser.state_dict()["state"].get(0, {})
        tensors |= {f"{name}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return tensors | {"generator": made.generator.get_state()}


@pytest.fixture(scope="module")
def finished(ball, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "ball"
    assert run(ball, "--preset", "tiny", "--steps", 200, "--output", run_dir) == 0
    return run_dir


def strategies(name: str, **changes) -> SplatConfig:
    config = tiny(steps=20)
    return replace(config, densify=replace(config.densify, strategy=name, **changes))


class TestTraining:
    def test_loss_falls_and_gaussians_are_added(self, finished):
        records = log_of(finished)
        assert [record["step"] for record in records] == list(range(1, 201))
        l1 = [record["losses"]["l1"] for record in records]
        assert np.mean(l1[-10:]) < 0.6 * np.mean(l1[:10])
        counts = [record["metrics"]["gaussians"] for record in records]
        assert counts[0] < counts[-1] == 300

    def test_run_directory_holds_pictures_the_page_and_the_gaussians(self, finished):
        evaluation = json.loads((finished / "evaluation.json").read_text())
        assert evaluation["held_out"] == "views" and evaluation["gaussians"] == 300
        assert {"photo", "render", "error", "depth", "accumulation"} == set(
            evaluation["views"][0]["images"]
        )
        assert (finished / "report.html").stat().st_size > 10_000
        exported = read_ply(finished / "splats.ply")
        last = runs.read_checkpoint(finished / "checkpoint.pt", trainer.FORMAT)["gaussians"]
        torch.testing.assert_close(exported.means, last["means"])
        profile = json.loads((finished / "profile.json").read_text())
        ops = {op["op"] for op in profile["ops"]}
        assert {"composite_tiles", "project_gaussians", "spherical_harmonics"} <= ops
        assert {"picture", "loss", "optimiser"} <= {part["name"] for part in profile["parts"]}

    def test_held_out_views_resemble_the_photographs(self, finished, ball):
        evaluation = json.loads((finished / "evaluation.json").read_text())
        photos = scenes.load_scene(ball).rgb
        blank = -10 * math.log10((photos - photos.mean(0)).square().mean().item())
        assert evaluation["psnr"] > blank + 1

    @pytest.mark.parametrize(
        "config",
        [strategies("mcmc"), strategies("default", grow_gradient=0.0), strategies("none")],
        ids=["mcmc", "default", "none"],
    )
    def test_resume_continues_bit_for_bit(self, ball, tmp_path, config):
        scene = scenes.load_scene(ball)
        whole, half = (trainer.Trainer(config, scene) for _ in range(2))
        first = len(whole.parameters["means"])
        torch.manual_seed(0)
        for _ in range(14):
            whole.train_step()
        torch.manual_seed(0)
        for _ in range(7):
            half.train_step()
        runs.save_checkpoint(tmp_path / "checkpoint.pt", half.state())
        del half
        torch.rand(5)
        again = trainer.Trainer(config, scene)
        again.load(runs.read_checkpoint(tmp_path / "checkpoint.pt", trainer.FORMAT))
        for _ in range(7):
            again.train_step()
        expected, ours = state_of(whole), state_of(again)
        assert expected.keys() == ours.keys()
        assert [name for name in expected if not torch.equal(expected[name], ours[name])] == []
        changed = len(whole.parameters["means"]) != first
        assert changed == (config.densify.strategy != "none")

    def test_other_seeds_give_other_runs(self, ball):
        scene = scenes.load_scene(ball)
        totals = [
            float(trainer.Trainer(tiny(seed=seed), scene).train_step().total.detach())
            for seed in (0, 0, 1)
        ]
        assert totals[0] == totals[1] != totals[2]

    def test_what_is_held_out_changes_nothing(self):
        scene, other = (scenes.load_motorcycle(crop=32) for _ in range(2))
        other.rgb = torch.where(other.held_out[..., None], 1 - other.rgb, other.rgb)
        config = tiny()
        made = [trainer.Trainer(config, s) for s in (scene, other)]
        for one in made:
            torch.manual_seed(0)
            for _ in range(3):
                one.train_step()
        for name in made[0].parameters:
            assert torch.equal(made[0].parameters[name], made[1].parameters[name]), name

    def test_interrupt_saves_and_resume_finishes_the_same_run(self, ball, tmp_path):
        arguments = ["--preset", "tiny", "--steps", 12]
        assert run(ball, *arguments, "--output", tmp_path / "whole") == 0
        with interrupted_after(trainer.Trainer, 7):
            assert run(ball, *arguments, "--output", tmp_path / "parts") == 130
        assert run("--resume", tmp_path / "parts") == 0
        logs = [[r["losses"] for r in log_of(tmp_path / name)] for name in ("whole", "parts")]
        assert logs[0] == logs[1]
        plys = [(tmp_path / name / "splats.ply").read_bytes() for name in ("whole", "parts")]
        assert plys[0] == plys[1]

    @pytest.mark.parametrize("degree", [0, 2])
    def test_starts_from_the_gaussians_of_a_file(self, ball, tmp_path, degree):
        made = gaussians(count=30, degree=1)
        write_ply(tmp_path / "points.ply", made)
        config = tiny(points=tmp_path / "points.ply", sh_degree=degree)
        start = trainer.Trainer(config, scenes.load_scene(ball)).gaussians
        made.quats /= made.quats.norm(dim=1, keepdim=True)
        for name in ("means", "scales", "quats", "opacities", "sh0"):
            torch.testing.assert_close(getattr(start, name).detach(), getattr(made, name))
        assert start.degree == degree
        both = min(start.shN.shape[1], made.shN.shape[1])
        assert torch.equal(start.shN[:, :both], made.shN[:, :both])
        assert not start.shN[:, both:].any()

    def test_photographs_stand_in_front_of_the_background(self, ball):
        scene = scenes.load_scene(ball)
        made = trainer.Trainer(tiny(), scene)
        view, white = made.views[0], torch.ones(3)
        target = made._target(view, white, white)
        assert torch.equal(target, scene.rgb[view] + (1 - scene.alpha[view])[..., None])
        assert (target[0, 0] == 1).all()


def rejected(capfd, *arguments) -> str:
    """The one line on stderr of a call that must fail with code 2."""
    assert cli.main([*map(str, arguments)]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"rayfuse {arguments[0]}: ") and " must " in lines[0], lines[0]
    return lines[0]


class TestCommandLine:
    @pytest.mark.parametrize(
        "option, value",
        [
            ("--steps", 0),
            ("--first", 0),
            ("--sh-degree", 5),
            ("--ssim-weight", 1.5),
            ("--densify.stop", -1),
            ("--points", "nowhere.ply"),
            ("--device", "nonsense"),
        ],
    )
    def test_bad_options_are_one_line(self, ball, capfd, tmp_path, monkeypatch, option, value):
        monkeypatch.chdir(tmp_path)
        line = rejected(capfd, "splat", ball, "--preset", "tiny", option, value)
        assert str(value) in line
        assert list(tmp_path.iterdir()) == []

    def test_bad_scenes_and_points_are_one_line(self, capfd, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        fisheye, empty, points = tmp_path / "fisheye", tmp_path / "empty", tmp_path / "cut.ply"
        write_scene(fisheye, views=2, side=16, camera_model="OPENCV_FISHEYE")
        assert "OPENCV_FISHEYE" in rejected(capfd, "splat", fisheye, "--preset", "tiny")
        write_scene(empty, views=2, side=16)
        for path in (empty / "images").iterdir():
            Image.new("RGBA", (16, 16)).save(path)
        assert "points must be at least 4" in rejected(capfd, "splat", empty, "--preset", "tiny")
        write_ply(points, gaussians())
        points.write_bytes(points.read_bytes()[:-10])
        arguments = ("splat", "--preset", "tiny", "--points", points)
        assert "must be a whole .ply" in rejected(capfd, *arguments)
        assert not (tmp_path / "runs").exists()

    def test_a_checkpoint_of_the_other_job_is_refused(self, capfd, tmp_path):
        (tmp_path / "run").mkdir()
        path = tmp_path / "run" / "checkpoint.pt"
        runs.save_checkpoint(path, {"format": "rayfuse.train/1"})
        assert "rayfuse.splat/1" in rejected(capfd, "splat", "--resume", tmp_path / "run")

    @pytest.mark.parametrize("name", PRESETS)
    def test_configurations_survive_json(self, name):
        config = parse(["--preset", name])
        assert from_json(SplatConfig, json.loads(json.dumps(to_json(config)))) == config


class TestView:
    def test_serves_a_page_where_the_first_photograph_was_taken(self, finished, ball):
        path = finished / "splats.ply"
        server = view.serve(read_ply(path), "127.0.0.1", 8123, view._first_camera(path))
        try:
            page = urllib.request.urlopen(f"http://127.0.0.1:{server.get_port()}").read()
            assert b"<html" in page
            pose, start = scenes.load_scene(ball).poses[0], server.initial_camera
            assert start.position == pytest.approx(pose[:, 3].numpy(), abs=1e-5)
            towards = (start.look_at - start.position) / np.linalg.norm(
                start.look_at - start.position
            )
            assert towards == pytest.approx(-pose[:, 2].numpy(), abs=1e-5)
        finally:
            server.stop()

    def test_bad_files_are_one_line(self, capfd, tmp_path):
        assert "nowhere.ply" in rejected(capfd, "view", tmp_path / "nowhere.ply")
        write_ply(tmp_path / "a.ply", gaussians())
        for damage in ("", "[]", "[{}]", "{}"):
            (tmp_path / "cameras.json").write_text(damage)
            assert "must list cameras" in rejected(capfd, "view", tmp_path / "a.ply")
