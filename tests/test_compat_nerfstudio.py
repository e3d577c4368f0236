"""nerfstudio's losses, weights and renderers: what rayfuse puts behind their names is the same."""

import importlib
import importlib.util
import inspect
import sys
import types
from unittest import mock

import pytest
import torch

import rayfuse
from rayfuse.compat import nerfstudio as compat
from rayfuse.compat.nerfstudio import losses as ours

R, S, E = 6, 9, 5


def reason():
    """Why nerfstudio is not here to compare with, or None."""
    for name in ("nerfstudio", "nerfacc", "jaxtyping", "rich"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed (make test installs what is needed of it)"
    return None


needs_nerfstudio = pytest.mark.skipif(reason() is not None, reason=str(reason()))


# what nerfstudio imports and does not use here: the viewer, images, logs
UNUSED = ("viser", "viser.transforms", "cv2", "torch.utils.tensorboard")


def imported(name):
    """A module of nerfstudio, for whose import what is not used may be missing."""
    stubs = []
    for unused in UNUSED:
        try:
            importlib.import_module(unused)
        except ImportError:
            sys.modules[unused] = mock.MagicMock()
            stubs.append(unused)
    try:
        return importlib.import_module(f"nerfstudio.{name}")
    finally:
        for stub in stubs:
            del sys.modules[stub]


@pytest.fixture
def theirs():
    """nerfstudio's losses, rays and renderers, as published."""
    names = ("model_components.losses", "cameras.rays", "model_components.renderers")
    modules = [imported(name) for name in names]
    yield types.SimpleNamespace(**dict(zip(("losses", "rays", "renderers"), modules, strict=True)))
    compat.uninstall()


class Samples:
    """Leaves that want a gradient, by name, and nerfstudio's own containers of them."""

    def __init__(self, rays=None, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        self.leaves = {}

        def leaf(name, *shape, signed=False):
            x = torch.rand(*shape, generator=generator, dtype=torch.float64)
            x = (2 * x - 1 if signed else x).to(dtype)
            self.leaves[name] = x.requires_grad_()
            return x

        def weights(name, samples):
            return leaf(name, R, samples, 1)

        def edges(name, samples):
            t = torch.rand(R, samples + 1, generator=generator, dtype=torch.float64).sort(-1).values
            self.leaves[name] = t.to(dtype).requires_grad_()
            return self.leaves[name]

        self.t, self.t_env, self.s = edges("t", S), edges("t_env", E), edges("s", S)
        self.w, self.w_env = weights("w", S), weights("w_env", E)
        self.n, self.n_pred = (leaf(name, R, S, 3, signed=True) for name in ("n", "n_pred"))
        self.d, self.depth = leaf("d", R, 3, signed=True), leaf("depth", R, 1)
        self.f, self.sigma = leaf("f", R, S, 3), weights("sigma", S)
        # two rays without a depth
        self.target = (torch.rand(R, 1, generator=generator) * (torch.arange(R) > 1)[:, None]).to(
            dtype
        )
        if rays is not None:
            self.samples = self.container(rays, self.t, self.s)
            self.proposal = self.container(rays, self.t_env, self.t_env)

    def container(self, rays, t, s):
        origins = torch.zeros(R, 3, dtype=t.dtype)
        bundle = rays.RayBundle(origins, self.d.detach(), origins[:, :1])
        t, s = t[..., None], s[..., None]
        return bundle.get_ray_samples(
            *(t[:, :-1], t[:, 1:]), spacing_starts=s[:, :-1], spacing_ends=s[:, 1:]
        )

    def gradients(self, out):
        """The output, and the gradients of all leaves; a missing one is 0."""
        outputs = [y for y in (out if isinstance(out, tuple) else (out,)) if y.requires_grad]
        d = [torch.linspace(0.5, 1, y.numel(), dtype=y.dtype).view_as(y) for y in outputs]
        found = torch.autograd.grad(
            outputs, [*self.leaves.values()], d, allow_unused=True, materialize_grads=True
        )
        return out, dict(zip(self.leaves, found, strict=True))


# name -> how the losses of a module are called
CALLS = {
    "outer": lambda m, x: m.outer(
        x.t[:, :-1], x.t[:, 1:], x.t_env[:, :-1], x.t_env[:, 1:], x.w_env[..., 0]
    ),
    "lossfun_outer": lambda m, x: m.lossfun_outer(x.t, x.w[..., 0], x.t_env, x.w_env[..., 0]),
    "ray_samples_to_sdist": lambda m, x: m.ray_samples_to_sdist(x.samples),
    "interlevel_loss": lambda m, x: m.interlevel_loss(
        [x.w_env, 2 * x.w_env, x.w], [x.proposal, x.proposal, x.samples]
    ),
    "lossfun_distortion": lambda m, x: m.lossfun_distortion(x.t, x.w[..., 0]),
    "distortion_loss": lambda m, x: m.distortion_loss([x.w_env, x.w], [x.proposal, x.samples]),
    "nerfstudio_distortion_loss": lambda m, x: m.nerfstudio_distortion_loss(x.samples, weights=x.w),
    "orientation_loss": lambda m, x: m.orientation_loss(x.w, x.n, x.d),
    "pred_normal_loss": lambda m, x: m.pred_normal_loss(x.w, x.n, x.n_pred),
    "ds_nerf_depth_loss": lambda m, x: m.ds_nerf_depth_loss(
        x.w, x.target, x.samples.frustums.starts, x.samples.deltas, x.target.new_tensor(0.1)
    ),
    "urban_radiance_field_depth_loss": lambda m, x: m.urban_radiance_field_depth_loss(
        x.w, x.target, x.depth, x.samples.frustums.starts, x.target.new_tensor(0.1)
    ),
    **{
        f"depth_loss {name}, euclidean {euclidean}": lambda m, x, name=name, e=euclidean: (
            m.depth_loss(
                *(x.w, x.samples, x.target, x.depth, x.target.new_tensor(0.2), 2 * x.target + 1, e),
                m.DepthLossType[name],
            )
        )
        for name in ("DS_NERF", "URF")
        for euclidean in (True, False)
    },
}


@needs_nerfstudio
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_loss_and_its_gradients_are_nerfstudios(theirs, name, dtype):
    x = Samples(theirs.rays, dtype)
    want, got = (x.gradients(CALLS[name](m, x)) for m in (theirs.losses, ours))
    assert got[0].shape == want[0].shape
    torch.testing.assert_close(got, want)
    # a second call, where nerfstudio's function is ours
    compat.install()
    torch.testing.assert_close(x.gradients(CALLS[name](theirs.losses, x)), got)


def test_every_loss_is_called():
    assert {name.partition(" ")[0] for name in CALLS} == {*ours.FUNCTIONS}


@needs_nerfstudio
def test_functions_have_the_parameters_of_nerfstudios(theirs):
    for name in ours.FUNCTIONS:
        mine, other = (inspect.signature(getattr(m, name)) for m in (ours, theirs.losses))
        assert [*mine.parameters] == [*other.parameters], name
        assert [p.default for p in mine.parameters.values()] == [
            p.default for p in other.parameters.values()
        ], name


@needs_nerfstudio
def test_samples_outside_the_proposal_are_bounded_by_its_first_and_last_bin(theirs):
    x = Samples()
    t = 3 * x.t - 1
    args = t, x.w[..., 0], x.t_env, x.w_env[..., 0]
    torch.testing.assert_close(ours.lossfun_outer(*args), theirs.losses.lossfun_outer(*args))
    # and edges that coincide
    args = x.t, x.w[..., 0], x.t, x.sigma[..., 0]
    torch.testing.assert_close(ours.lossfun_outer(*args), theirs.losses.lossfun_outer(*args))


def test_nothing_but_a_final_level_is_an_error():
    with pytest.raises(ValueError, match="weights_list must hold a proposal and the final level"):
        ours.interlevel_loss([torch.ones(1, 1, 1)], [None])
    with pytest.raises(ValueError, match="give densities or weights, got neither"):
        ours.nerfstudio_distortion_loss(None)


@pytest.mark.parametrize("loss", ["ds_nerf", "urban"])
def test_ray_without_a_depth_adds_nothing_whatever_it_holds(loss):
    x = Samples()
    steps, lengths = x.s[:, 1:, None].detach(), x.s.diff(dim=-1)[..., None].detach()
    target = torch.full((R, 1), 0.5).double()
    target[0], target[1] = 0, torch.nan

    def call(rays):
        w, d = x.w[rays], target[rays]
        if loss == "ds_nerf":
            return ours.ds_nerf_depth_loss(w, d, steps[rays], lengths[rays], 0.1)
        return ours.urban_radiance_field_depth_loss(w, d, x.depth[rays], steps[rays], 0.1)

    torch.testing.assert_close(call(slice(None)), call(slice(2, None)) * (R - 2) / R)
    _, grads = x.gradients(call(slice(None)))
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert not grads["w"][:2].any()


# ---- weights and renderers, before and after install()


def rendered(theirs, x, colour="random", **options):
    renderer = theirs.renderers.RGBRenderer(colour)
    return renderer(rgb=x.f, weights=x.w / S, **options)


def depth(theirs, x, method):
    return theirs.renderers.DepthRenderer(method)(weights=x.w / S, ray_samples=x.samples)


METHODS = {
    "weights": lambda n, x: x.samples.get_weights(x.sigma),
    "weights of alphas": lambda n, x: n.rays.RaySamples.get_weights_and_transmittance_from_alphas(
        x.w
    ),
    "weights of alphas alone": lambda n, x: (
        n.rays.RaySamples.get_weights_and_transmittance_from_alphas(x.w, weights_only=True)
    ),
    **{
        f"rgb on {c}": lambda n, x, c=c: rendered(n, x, c)
        for c in ("random", "last_sample", "white")
    },
    "rgb on a tensor": lambda n, x: rendered(n, x, torch.tensor([0.1, 0.2, 0.3])),
    "rgb on one of each ray": lambda n, x: rendered(n, x, "white", background_color=x.d.detach()),
    "rgb of one dimension more": lambda n, x: n.renderers.RGBRenderer.combine_rgb(
        x.f[None], x.w[None], "white"
    ),
    "expected depth": lambda n, x: depth(n, x, "expected"),
    "median depth": lambda n, x: depth(n, x, "median"),
    "semantics": lambda n, x: n.renderers.SemanticRenderer()(x.n, x.w),
    "normals": lambda n, x: n.renderers.NormalsRenderer()(x.n, x.w),
    "normals as they are": lambda n, x: n.renderers.NormalsRenderer()(x.n, x.w, normalize=False),
}


@needs_nerfstudio
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_method_and_its_gradients_are_nerfstudios(theirs, name, dtype):
    x = Samples(theirs.rays, dtype)
    want = x.gradients(METHODS[name](theirs, x))
    compat.install()
    with rayfuse.use_backend("cpu"):
        rayfuse.distortion_loss(torch.arange(2.0), torch.ones(1))
    with rayfuse.use_backend("ref"):
        got = x.gradients(METHODS[name](theirs, x))
    assert rayfuse.last_backend() == "ref", "nerfstudio's own has run"
    # nerfstudio adds 1e-7 to what each sample lets through
    near = {"rtol": 1e-5, "atol": 1e-5} if "alphas" in name else {}
    torch.testing.assert_close(got, want, **near)


@needs_nerfstudio
def test_override_of_the_background_is_heeded(theirs):
    x = Samples(theirs.rays)
    colour = torch.tensor([0.3, 0.6, 0.9]).double()
    with theirs.renderers.background_color_override_context(colour):
        want = rendered(theirs, x, "last_sample")
        compat.install()
        torch.testing.assert_close(rendered(theirs, x, "last_sample"), want)
    assert not torch.allclose(rendered(theirs, x, "last_sample"), want)


@needs_nerfstudio
def test_packed_samples_still_go_to_nerfacc(theirs):
    w, f, ray_indices = torch.rand(4, 1), torch.rand(4, 3), torch.tensor([0, 0, 2, 2])
    packed = dict(ray_indices=ray_indices, num_rays=3)

    def results():
        yield theirs.renderers.RGBRenderer.combine_rgb(f, w, "white", **packed)
        yield theirs.renderers.RGBRenderer.combine_rgb(f, w, "white", ray_indices, 3)
        yield theirs.renderers.SemanticRenderer()(f, w, **packed)

    want = [*results()]
    compat.install()
    torch.testing.assert_close([*results()], want)


@needs_nerfstudio
def test_what_fails_in_nerfstudio_is_right(theirs):
    compat.install()
    # two batch dimensions
    x = Samples(theirs.rays)
    flat = x.samples.get_weights(x.sigma)
    batched = types.SimpleNamespace(deltas=x.samples.deltas.view(2, 3, S, 1))
    get_weights = theirs.rays.RaySamples.get_weights
    torch.testing.assert_close(get_weights(batched, x.sigma.view(2, 3, S, 1)).view(R, S, 1), flat)
    # a loss of densities, where nerfstudio's own assertions contradict each other
    torch.testing.assert_close(
        ours.nerfstudio_distortion_loss(x.samples, x.sigma),
        ours.nerfstudio_distortion_loss(x.samples, weights=flat),
    )
    # an infinite density in an interval without width, and a wall
    sigma = torch.tensor([1.0, torch.inf, 1.0, torch.inf, 1.0])[None, :, None].requires_grad_()
    deltas = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])[None, :, None]
    w = get_weights(types.SimpleNamespace(deltas=deltas), sigma)
    assert w[0, 1] == 0
    assert w[0, 4] == 0
    torch.testing.assert_close(w.sum().item(), 1.0)
    (d_sigma,) = torch.autograd.grad(w.square().sum(), sigma)
    assert torch.isfinite(d_sigma).all()
    # a density that is not a number, here as there: no weight from it on, and only in its ray
    sigma = x.sigma.detach().clone()
    sigma[1, 3] = torch.nan
    w = x.samples.get_weights(sigma.requires_grad_())
    assert not w[1, 3:].any()
    torch.testing.assert_close(w[1, :3], flat[1, :3])
    (d_sigma,) = torch.autograd.grad(w.sum(), sigma)
    assert torch.isfinite(d_sigma[[0, 2, 3, 4, 5]]).all()
    # an opaque sample hides the others by all of their weight
    alpha = torch.tensor([0.5, 1.0, 0.5])[None, :, None].requires_grad_()
    w, _ = theirs.rays.RaySamples.get_weights_and_transmittance_from_alphas(alpha)
    assert w.flatten().tolist() == [0.5, 0.5, 0.0]
    (d_alpha,) = torch.autograd.grad(w[0, 2, 0], alpha)
    assert d_alpha.flatten().tolist() == [0.0, -0.25, 0.0]


@needs_nerfstudio
def test_expected_depth_stays_within_its_own_ray(theirs):
    compat.install()
    x = Samples(theirs.rays)
    w = torch.zeros_like(x.w)
    depth = theirs.renderers.DepthRenderer("expected")(weights=w, ray_samples=x.samples)
    torch.testing.assert_close(depth, (x.t[:, :1] + x.t[:, 1:2]) / 2)


# ---- a model


def nerfacto(rays):
    """A small model as it is configured to train, and a step: losses, outputs, gradients."""
    model_of = imported("models.nerfacto")
    camera = imported("cameras.camera_optimizers").CameraOptimizerConfig(mode="off")
    box = imported("data.scene_box").SceneBox(torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    config = model_of.NerfactoModelConfig(
        implementation="torch",
        predict_normals=True,
        num_levels=4,
        log2_hashmap_size=10,
        max_res=64,
        num_proposal_samples_per_ray=(32, 24),
        num_nerf_samples_per_ray=16,
        camera_optimizer=camera,
    )
    for proposal in config.proposal_net_args_list:
        proposal.update(log2_hashmap_size=10, max_res=32)
    torch.manual_seed(0)
    with mock.patch("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity"):
        model = config.setup(scene_box=box, num_train_data=4, device="cpu", grad_scaler=None)
    model.train()

    def step():
        torch.manual_seed(1)
        d = torch.nn.functional.normalize(torch.randn(64, 3), dim=-1)
        one = torch.ones(64, 1)
        bundle = rays.RayBundle(
            *(torch.randn(64, 3) / 10, d, one),
            camera_indices=torch.zeros(64, 1, dtype=torch.long),
            nears=0.05 * one,
            fars=4 * one,
        )
        outputs = model.get_outputs(bundle)
        batch = {"image": torch.rand(64, 3)}
        losses = model.get_loss_dict(outputs, batch, model.get_metrics_dict(outputs, batch))
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(sum(losses.values()), parameters, allow_unused=True)
        rendered = ("rgb", "accumulation", "depth", "expected_depth", "normals", "pred_normals")
        return losses, {name: outputs[name] for name in rendered}, grads

    return step


@needs_nerfstudio
def test_nerfacto_makes_the_same_step(theirs):
    pytest.importorskip("torchmetrics")
    step = nerfacto(theirs.rays)
    want = step()
    compat.install()
    got = step()
    assert {"interlevel_loss", "distortion_loss", "orientation_loss"} <= want[0].keys()
    for ours_, theirs_ in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-5)
    for ours_, theirs_ in zip(got[2], want[2], strict=True):
        assert (ours_ is None) == (theirs_ is None)
        if theirs_ is not None:
            assert (ours_ - theirs_).norm() <= 1e-4 * theirs_.norm()


# ---- install() itself


@needs_nerfstudio
def test_install_serves_modules_that_imported_by_name_and_uninstall_puts_back(theirs, monkeypatch):
    user = types.ModuleType("user_of_nerfstudio")
    user.loss, user.mine = theirs.losses.distortion_loss, ours.distortion_loss
    monkeypatch.setitem(sys.modules, user.__name__, user)
    owners = [theirs.rays.RaySamples, theirs.renderers.RGBRenderer, theirs.renderers.DepthRenderer]
    before = [dict(vars(owner)) for owner in (theirs.losses, *owners)]
    original = user.loss

    names = compat.install()
    assert {*names} == {
        *ours.FUNCTIONS,
        "RaySamples.get_weights",
        "RaySamples.get_weights_and_transmittance_from_alphas",
        "RGBRenderer.combine_rgb",
        "DepthRenderer.forward",
        "SemanticRenderer.forward",
        "NormalsRenderer.forward",
    }
    assert user.loss is theirs.losses.distortion_loss is not original
    once = user.loss
    assert compat.install() == names
    assert user.loss is once

    # a module that came later has it as well
    user.later = theirs.losses.orientation_loss
    compat.uninstall()
    assert user.loss is original
    assert user.later is theirs.losses.orientation_loss
    assert user.mine is ours.distortion_loss
    assert [dict(vars(owner)) for owner in (theirs.losses, *owners)] == before
    compat.uninstall()


def test_without_nerfstudio_install_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "nerfstudio.model_components.losses", None)
    with pytest.raises(ImportError, match="install: nerfstudio must be importable, got: "):
        compat.install()


@needs_nerfstudio
def test_edges_that_the_intervals_are_views_of_are_not_copied(theirs):
    x = Samples(theirs.rays)
    for leaf in (x.t, x.t_env, x.s):
        leaf.requires_grad_(False)
    frustums = x.container(theirs.rays, x.t, x.s).frustums
    assert ours.edges(frustums.starts, frustums.ends).data_ptr() == x.t.data_ptr()
    t = torch.rand(3, 10)
    for t_ in (t, t[:, ::2], t[:, :2], t.t(), t.t()[:2], t.view(3, 2, 5), t[0].expand(4, 10)):
        starts, ends = t_[..., :-1, None], t_[..., 1:, None]
        assert torch.equal(ours.edges(starts, ends), t_)
        assert torch.equal(ours.edges(starts.clone(), ends), t_)
    # one after the other in memory, and not a step apart
    starts, ends = t[:, :4, None], t[:, 5:9, None]
    assert torch.equal(ours.edges(starts, ends), torch.cat([t[:, :4], t[:, 8:9]], -1))


def test_intervals_with_gaps_are_an_error_in_debug_mode():
    x = Samples()
    starts, ends = x.t[:, :-1, None], x.t[:, 1:, None]
    with rayfuse.debug():
        ours.edges(starts, ends)
        with pytest.raises(ValueError, match="starts must be where the interval before ends"):
            ours.edges(starts, (starts + ends) / 2)
