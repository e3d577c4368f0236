import math

import pytest
import torch

import rayfuse
from conftest import EMULATED
from contract import Contract, are_same

SIZE = dict(image_width=40, image_height=30)


class TestProjectGaussians(Contract):
    op = rayfuse.project_gaussians
    # around the lanes of all registers; no Gaussians, no cameras
    sizes = tuple({"N": N, "C": C} for N, C in ((0, 1), (9, 2), (3, 1), (4, 0), (17, 1)))
    typical = {"N": 3, "C": 2}
    gpu_sizes = ({"N": 32, "C": 1}, {"N": 1000, "C": 3})
    variants = (
        dict(SIZE, covars=None),
        dict(SIZE, quats=None, scales=None, camera_model="ortho"),
        dict(SIZE, covars=None, opacities=None, eps2d=1.0, near_plane=2.5, radius_clip=9.0),
        dict(SIZE, quats=None, scales=None, compensate=True, far_plane=2.5),
    )

    def one(self, device, **changes):
        """A Gaussian on the axis of a camera at a distance of 2, 0.5 wide in x and 1 in y; leaves
        and the call."""
        named = dict(
            means=torch.tensor([[0.0, 0.0, 2.0]]),
            viewmats=torch.eye(4)[None],
            Ks=torch.tensor([[[16.0, 0.0, 20.0], [0.0, 16.0, 15.0], [0.0, 0.0, 1.0]]]),
            quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
            scales=torch.tensor([[0.5, 1.0, 0.0]]),
        )
        options = {**SIZE, **{k: v for k, v in changes.items() if not torch.is_tensor(v)}}
        named |= {k: v for k, v in changes.items() if torch.is_tensor(v)}
        leaves = {k: v.to(device).requires_grad_() for k, v in named.items()}
        return leaves, rayfuse.project_gaussians(**leaves, **options)

    # ---- what the contract says of rays, of Gaussians

    # it is culled
    test_nan_comes_out_as_nan = None

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38], ids=str)
    def test_bad_value_stays_in_its_own_ray(self, forced_backend, device, bad):
        """A Gaussian that is not finite is culled, as one that no camera sees."""
        clean = self.inputs((2,), device=device)
        unseen = [x.clone() for x in clean]
        unseen[0][1, 2, 2] = -1e3
        d_outputs = self.d_outputs(clean)
        for variant in self.variants[:2] if forced_backend in EMULATED else self.variants:
            want = self.gradients(unseen, d_outputs, variant)
            for i, name in enumerate(self.spec.inputs):
                inert = name in ("viewmats", "Ks") or variant.get(name, 0) is None
                if inert or (name == "opacities" and bad == 3e38):
                    continue
                args = [x.clone() for x in clean]
                args[i][1, 2] = bad
                got = self.gradients(args, d_outputs, variant)
                self.assert_equal(got, want, name)
                assert all((y[1, :, 2] == 0).all() for y in got[0])

    def test_result_is_the_same_to_the_bit_for_any_number_of_threads(self, forced_backend, device):
        N = 300 if forced_backend in EMULATED else 9_001
        args = self.inputs((2,), device=device, N=N, C=2)
        self.assert_the_same_for_any_number_of_threads(args, forced_backend)

    def test_many_gaussians_are_as_right_as_torch(self, forced_backend, device):
        N = 300 if forced_backend in EMULATED else 9_001
        for variant in self.variants[:2]:
            args = self.inputs((1,), device=device, N=N, C=2)
            self.assert_as_right_as_torch(args, variant=variant)

    # ---- the definition

    def test_gaussian_on_the_axis_is_scaled_by_focal_length_over_depth(
        self, forced_backend, device
    ):
        for camera_model, f in (("pinhole", 8.0), ("ortho", 16.0)):
            _, out = self.one(device, camera_model=camera_model)
            x, y = (f * 0.5) ** 2, (f * 1.0) ** 2
            got = [x.flatten().tolist() for x in out]
            want = [
                [20.0, 15.0],
                [2.0],
                [1 / (x + 0.3), 0.0, 1 / (y + 0.3)],
                [1.0 * math.ceil(3.33 * math.sqrt(v + 0.3)) for v in (x, y)],
                [math.sqrt(x * y / (x + 0.3) / (y + 0.3))],
            ]
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)

    def test_agrees_with_gsplat(self, forced_backend, device):
        torch_impl = pytest.importorskip("gsplat.cuda._torch_impl")
        args = self.inputs((2,), torch.float64, device, N=20, C=3)
        named = dict(zip(self.spec.inputs, args, strict=True))
        named["Ks"] = named["Ks"] * torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 0]], device=device)
        named["Ks"][..., 2, 2] = 1
        names = ("means", "viewmats", "quats", "scales")
        leaves = {name: named[name].requires_grad_() for name in names}
        for camera_model in ("pinhole", "ortho"):
            covars, _ = torch_impl._quat_scale_to_covar_preci(named["quats"], named["scales"])
            radii, *theirs = torch_impl._fully_fused_projection(
                named["means"], covars, named["viewmats"], named["Ks"], 40, 30,
                calc_compensations=True, camera_model=camera_model,
            )  # fmt: skip
            out = rayfuse.project_gaussians(
                **leaves, Ks=named["Ks"], **SIZE, camera_model=camera_model
            )
            seen = (radii > 0).all(-1)
            assert torch.equal(out.radii, (radii * seen[..., None]).double())
            ours = [out.means2d, out.depths, out.conics, out.compensations]
            torch.testing.assert_close([x[seen] for x in ours], [x[seen] for x in theirs])
            d_outputs = [torch.rand_like(x) for x in ours]
            got = torch.autograd.grad(ours, [*leaves.values()], d_outputs)
            total = sum((x * d)[seen].sum() for x, d in zip(theirs, d_outputs, strict=True))
            torch.testing.assert_close(got, torch.autograd.grad(total, [*leaves.values()]))

    def test_jacobian_stops_at_a_slope_outside_of_the_image(self, forced_backend, device):
        far, (_, edge) = (
            self.one(device, means=torch.tensor([[x, 0.0, 2.0]]), scales=torch.full((1, 3), 2.0))
            for x in (4.0, 2 * (20 / 16 + 0.15 * 40 / 16))
        )
        torch.testing.assert_close(far[1].conics, edge.conics)
        assert far[1].means2d[0, 0, 0] == 52
        # what the conic says of x alone is gone, and z is still in it
        (d_means,) = torch.autograd.grad(far[1].conics[..., 0].sum(), [far[0]["means"]])
        assert d_means[0, 0] == 0 and d_means[0, 2] > 0

    def test_length_of_a_quaternion_says_nothing(self, forced_backend, device):
        args = self.inputs(dtype=torch.float64, device=device)
        i = self.spec.inputs.index("quats")
        longer = [*args[:i], 3 * args[i], *args[i + 1 :]]
        outputs, grads = self.gradients(args)
        same, less = self.gradients(longer)
        torch.testing.assert_close(same, outputs)
        at = self.differentiable().index(i)
        torch.testing.assert_close(3 * less[at], grads[at])
        along = (grads[at] * args[i]).sum(-1)
        torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-10)

    def test_thin_splats_keep_their_digits(self, forced_backend, device):
        """The determinant of V is what is left of two numbers that are a million times larger."""
        if forced_backend == "ref":
            pytest.skip("subtracts as torch does")
        turned = torch.tensor([[0.9, 0.1, 0.2, 0.4]])
        scales = torch.tensor([[100.0, 0.01, 0.01]])
        _, out = self.one(device, quats=turned, scales=scales)
        with rayfuse.use_backend("ref"):
            _, true = self.one("cpu", quats=turned.double(), scales=scales.double(), **{
                name: x.double() for name, x in self.one("cpu")[0].items()
                if name not in ("quats", "scales")
            })  # fmt: skip
        torch.testing.assert_close(out.conics.cpu().double(), true.conics, rtol=1e-5, atol=0)

    # ---- what is seen

    @pytest.mark.parametrize(
        ("changes", "seen"),
        [
            (dict(near_plane=2.0), True),
            (dict(near_plane=2.0 + 1e-6), False),
            (dict(far_plane=2.0), True),
            (dict(far_plane=2.0 - 1e-6), False),
            # the radii are 14 and 27
            (dict(radius_clip=26.5), True),
            (dict(radius_clip=27.0), False),
            (dict(means=torch.tensor([[-4.2, 0.0, 2.0]])), True),
            (dict(means=torch.tensor([[-4.3, 0.0, 2.0]])), False),
            (dict(means=torch.tensor([[0.0, 5.2, 2.0]])), True),
            (dict(means=torch.tensor([[0.0, 5.3, 2.0]])), False),
            (dict(opacities=torch.tensor([1.001 / 255])), True),
            (dict(opacities=torch.tensor([0.999 / 255])), False),
            (dict(opacities=torch.tensor([1.01 / 255]), compensate=True), False),
            (dict(eps2d=0.0), True),
            (dict(eps2d=0.0, scales=torch.tensor([[0.5, 0.0, 0.0]])), False),
            (dict(quats=torch.zeros(1, 4)), False),
            (dict(quats=torch.full((1, 4), 1e-15)), True),
            (dict(quats=torch.full((1, 4), 1e20)), False),
        ],
        ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
    )
    def test_what_is_culled_is_zero_and_gives_no_gradient(
        self, forced_backend, device, changes, seen
    ):
        leaves, out = self.one(device, **changes)
        assert (out.radii > 0).all() == seen
        assert all(bool((x == 0).all()) != seen for x in (out.depths, out.conics, out.means2d))
        d_outputs = [torch.full_like(x, 1.0 if seen else torch.nan) for x in out]
        names = ("means", "viewmats", "quats", "scales")
        grads = torch.autograd.grad(out, [leaves[name] for name in names], d_outputs)
        assert all(bool((x == 0).all()) != seen for x in grads[:2])
        assert all(x.isfinite().all() for x in grads)

    def test_faint_splats_end_where_alpha_is_a_255th(self, forced_backend, device):
        variances = torch.tensor([16.3, 64.3])
        for opacity in (0.01, 0.1, 0.9, 1.0):
            _, out = self.one(device, opacities=torch.tensor([opacity]))
            extent = min(3.33, math.sqrt(2 * math.log(255 * opacity)))
            assert torch.equal(out.radii[0, 0].cpu(), (extent * variances.sqrt()).ceil())

    def test_camera_that_is_not_finite_sees_nothing(self, forced_backend, device):
        for i, name in ((1, "viewmats"), (2, "Ks")):
            args = self.inputs(device=device)
            args[i][:, 1, 0, 0] = torch.nan
            alone = [x[:, :1] if j in (1, 2) else x for j, x in enumerate(args)]
            d_outputs = self.d_outputs(args)
            outputs, grads = self.gradients(args, d_outputs)
            want = self.gradients(alone, [d_y[:, :1] for d_y in d_outputs])
            assert all((y[:, 1] == 0).all() for y in outputs), name
            assert (grads[1][:, 1] == 0).all()
            grads = (grads[0], grads[1][:, :1], *grads[2:])
            self.assert_equal(([y[:, :1] for y in outputs], grads), want, name, are_same)

    def test_radii_give_no_gradient(self, forced_backend, device):
        args = self.leaves(self.inputs(device=device))
        radii = self.call(args).radii
        assert torch.equal(radii, radii.round())
        grads = torch.autograd.grad(radii.sum(), [args[i] for i in self.differentiable()])
        assert all((x == 0).all() for x in grads)

    # ---- errors

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(quats=None), "covars must be given, or quats and scales, got scales"),
            (dict(quats=None, scales=None), "or quats and scales, got neither"),
            (dict(covars=torch.ones(2, 3, 6)), "quats and scales, got quats and scales and covars"),
            (dict(image_width=0), "image_width must be >= 1, got 0"),
            (dict(image_height=-2), "image_height must be >= 1, got -2"),
            (dict(eps2d=-0.1), "eps2d must be finite and >= 0, got -0.1"),
            (dict(camera_model="fisheye"), "camera_model must be 'pinhole' or 'ortho', got 'fish"),
        ],
        ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
    )
    def test_what_does_not_fit_is_named(self, change, message):
        with pytest.raises(ValueError) as raised:
            self.call(self.inputs((2,)), {**self.variants[0], **change})
        assert message in str(raised.value)
