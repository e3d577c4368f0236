"""What only spherical harmonics know: the functions themselves, which directions and coefficients
count, and in which shapes they may come."""

import math

import pytest
import torch

import rayfuse
from conftest import EMULATED
from contract import Contract


def harmonics_of_plenoctrees(x, y, z):
    """Those of degree 0 to 4 as Yu et al. (2021) write them, and Kerbl et al. after them."""
    xx, yy, zz = x * x, y * y, z * z
    return torch.stack(
        [
            0.28209479177387814 + 0 * x,
            *(-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x),
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * zz - xx - yy),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (xx - yy),
            -0.5900435899266435 * y * (3 * xx - yy),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * zz - xx - yy),
            0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
            -0.4570457994644658 * x * (4 * zz - xx - yy),
            1.445305721320277 * z * (xx - yy),
            -0.5900435899266435 * x * (xx - 3 * yy),
            2.5033429417967046 * x * y * (xx - yy),
            -1.7701307697799304 * y * z * (3 * xx - yy),
            0.9461746957575601 * x * y * (7 * zz - 1),
            -0.6690465435572892 * y * z * (7 * zz - 3),
            0.10578554691520431 * (zz * (35 * zz - 30) + 3),
            -0.6690465435572892 * x * z * (7 * zz - 3),
            0.47308734787878004 * (xx - yy) * (7 * zz - 1),
            -1.7701307697799304 * x * z * (xx - 3 * yy),
            0.6258357354491761 * (xx * (xx - 3 * yy) - yy * (3 * xx - yy)),
        ],
        -1,
    )


class TestSphericalHarmonics(Contract):
    op = rayfuse.spherical_harmonics
    # one splat more and one less than registers have lanes, and channels than a vector of 3
    sizes = tuple(
        dict(zip("CNKD", sizes, strict=True))
        for sizes in ((2, 0, 25, 3), (2, 9, 25, 3), (1, 1, 26, 1))
    )
    typical = {"C": 1, "N": 2, "K": 25, "D": 2}
    variants = (dict(degree=3, masks=None), dict(degree=4))
    gpu_sizes = ({"C": 1, "N": 64, "K": 16, "D": 3}, {"C": 2, "N": 9, "K": 25, "D": 64})

    def test_harmonics_are_those_of_plenoctrees(self, forced_backend, device):
        generator = torch.Generator().manual_seed(0)
        unit = torch.randn(50, 3, generator=generator, dtype=torch.float64)
        unit /= unit.norm(dim=-1, keepdim=True)
        want = harmonics_of_plenoctrees(*unit.unbind(-1))
        each = torch.eye(25, dtype=torch.float64).expand(50, 25, 25)
        got = rayfuse.spherical_harmonics(unit.to(device), each.to(device), degree=4)
        torch.testing.assert_close(got.cpu(), want)

    def test_harmonics_are_orthonormal_on_the_sphere(self):
        """By a quadrature that is exact: products have degree 8."""
        z, weights = (
            torch.tensor([-0.9061798459386640, -0.5384693101056831, 0.0]),
            torch.tensor([0.2369268850561891, 0.4786286704993665, 0.5688888888888889]),
        )
        z = torch.cat([z, -z[:2]]).double()
        weights = torch.cat([weights, weights[:2]]).double()
        angles = torch.arange(9, dtype=torch.float64) * (2 * math.pi / 9)
        radius = (1 - z * z).sqrt()[:, None]
        points = torch.stack(
            [radius * angles.cos(), radius * angles.sin(), z[:, None].expand(-1, 9)], -1
        ).flatten(0, 1)
        Y = rayfuse.spherical_harmonics(
            points, torch.eye(25, dtype=torch.float64).expand(45, 25, 25), degree=4
        )
        area = (weights[:, None] * (2 * math.pi / 9)).expand(-1, 9).flatten()
        torch.testing.assert_close(
            Y.T @ (area[:, None] * Y), torch.eye(25, dtype=torch.float64), atol=1e-6, rtol=0
        )

    @pytest.mark.parametrize("N", [63, 64, 65, 130], ids=str)
    def test_many_splats_are_as_right_as_torch(self, forced_backend, device, N):
        if forced_backend in EMULATED and N != 65:
            pytest.skip("one size is enough where a call takes long")
        args = self.inputs((), device=device, C=2, N=N, K=16, D=3)
        self.assert_as_right_as_torch(args, variant=dict(degree=3))

    @pytest.mark.parametrize(("degree", "D"), [(0, 3), (0, 5), (1, 0), (2, 7), (2, 70)], ids=str)
    def test_other_degrees_and_channels_are_as_right_as_torch(
        self, forced_backend, device, degree, D
    ):
        args = self.inputs((), device=device, C=2, N=3, K=9, D=D)
        self.assert_as_right_as_torch(args, variant=dict(degree=degree))

    def test_length_of_a_direction_does_not_count(self, forced_backend, device):
        dirs, coeffs, _ = self.inputs((), torch.float64, device)
        dirs.requires_grad_()
        colors = rayfuse.spherical_harmonics(dirs, coeffs, degree=3)
        torch.testing.assert_close(
            rayfuse.spherical_harmonics(1e-9 * dirs, coeffs, degree=3), colors
        )
        (d_dirs,) = torch.autograd.grad(colors.square().sum(), dirs)
        along = (d_dirs * dirs).sum(-1)
        torch.testing.assert_close(along, torch.zeros_like(along))

    @pytest.mark.parametrize("length", [0.0, 1e-30], ids=str)
    def test_direction_without_length_has_values_and_no_gradient(
        self, forced_backend, device, length
    ):
        dirs, coeffs, masks = self.inputs((), device=device)
        dirs[0, 1] = torch.tensor([length, 0.0, 0.0], device=device)
        outputs, (d_dirs, d_coeffs) = self.gradients([dirs, coeffs, masks])
        Y = harmonics_of_plenoctrees(*torch.zeros(3, dtype=torch.float64))[:16].float()
        # where z = 0, x^2 + y^2 is 0 too: of l = 2 the others write 1 - z^2 for it
        Y[6] = -0.31539156525252005
        torch.testing.assert_close(outputs[0][0, 1].cpu(), Y @ coeffs[1, :16].cpu())
        assert (d_dirs[0, 1] == 0).all() and d_coeffs.isfinite().all()

    # ---- what counts

    def test_coefficients_beyond_the_degree_are_never_read(self, forced_backend, device):
        args = self.inputs((2,), device=device)
        clean = self.gradients(args)
        args[1][:, :, 16:] = torch.nan
        hostile = self.gradients(args)
        self.assert_equal(hostile, clean)
        assert (hostile[1][1][:, :, 16:] == 0).all()

    def test_what_is_masked_is_never_read(self, forced_backend, device):
        dirs, coeffs, _ = self.inputs((), device=device, C=2, N=17, K=16, D=3)
        masks = torch.rand(2, 17, generator=torch.Generator().manual_seed(1)) < 0.5
        masks[:, 8:] = False
        masks[0, :8] = False
        masks[:, 5] = False
        variant = dict(degree=3)
        clean = self.gradients([dirs, coeffs, masks.to(device)], variant=variant)
        dirs[~masks.to(device)] = torch.nan
        coeffs[~masks.any(0).to(device)] = torch.inf
        hostile = self.gradients([dirs, coeffs, masks.to(device)], variant=variant)
        self.assert_equal(hostile, clean)
        (colors,), (d_dirs, d_coeffs) = hostile
        assert (colors[~masks] == 0).all() and (d_dirs[~masks] == 0).all()
        assert (d_coeffs[~masks.any(0)] == 0).all() and colors[masks].ne(0).all()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
    def test_bad_value_stays_in_its_own_splat(self, forced_backend, device, bad):
        clean = self.inputs((), device=device, C=2, N=9, K=16, D=3)
        d_outputs = self.d_outputs(clean)
        want = self.gradients(clean, d_outputs)
        others = torch.tensor([n for n in range(9) if n != 4], device=device)
        for i, place in ((0, (1, 4, 2)), (1, (4, 7, 1))):
            args = [x.clone() for x in clean]
            args[i][place] = bad
            got = self.gradients(args, d_outputs)
            for ours, right, along in zip(
                (*got[0], *got[1]), (*want[0], *want[1]), (1, 1, 0), strict=True
            ):
                left = [x.index_select(along, others) for x in (ours, right)]
                assert torch.equal(*left)
        # a direction is that of one camera
        args = [x.clone() for x in clean]
        args[0][1, 4, 2] = bad
        assert torch.equal(self.outputs(args)[0][0], want[0][0][0])

    # ---- shapes

    def test_coefficients_may_be_shared_expanded_or_of_each_direction(self, forced_backend, device):
        dirs, coeffs, masks = self.inputs((), device=device, C=3, N=5, K=9, D=3)
        results = []
        for shared in (coeffs, coeffs.expand(3, 5, 9, 3), coeffs.expand(3, 5, 9, 3).contiguous()):
            leaf = shared.detach().clone() if shared.is_contiguous() else coeffs.clone()
            leaf.requires_grad_()
            given = leaf if shared.is_contiguous() else leaf.expand(3, 5, 9, 3)
            colors = rayfuse.spherical_harmonics(dirs, given, masks=masks, degree=2)
            colors.square().sum().backward()
            grad = leaf.grad if leaf.dim() == 3 else leaf.grad.sum(0)
            results.append((colors, grad))
        for colors, grad in results[1:]:
            assert torch.equal(colors, results[0][0])
            torch.testing.assert_close(grad, results[0][1])

    @pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3)], ids=str)
    def test_leading_dimensions_of_gsplat(self, forced_backend, device, leading):
        generator = torch.Generator().manual_seed(0)
        dirs = torch.randn(*leading, 3, generator=generator).to(device)
        coeffs = torch.randn(*leading, 4, 3, generator=generator).to(device)
        masks = (torch.rand(leading, generator=generator) < 0.7).to(device)
        colors = rayfuse.spherical_harmonics(dirs, coeffs, masks=masks, degree=1)
        assert colors.shape == (*leading, 3)
        flat = rayfuse.spherical_harmonics(
            dirs.reshape(-1, 3), coeffs.reshape(-1, 4, 3), masks=masks.reshape(-1), degree=1
        )
        assert torch.equal(colors.reshape(-1, 3), flat)

    # ---- errors

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(degree=5), ValueError, "degree must be from 0 to 4, got 5"),
            (dict(degree=-1), ValueError, "degree must be from 0 to 4, got -1"),
            (dict(degree=1.0), TypeError, "degree must be an integer, got 1.0"),
            (
                dict(coeffs=torch.zeros(3, 15, 3)),
                ValueError,
                "coeffs must have shape [..., N, K, D] with K >= 16 (from degree), got [3, 15, 3]",
            ),
            (dict(masks=torch.ones(2, 3)), TypeError, "masks must be bool, got float32"),
            (
                dict(masks=torch.ones(3, dtype=torch.bool)),
                ValueError,
                "masks must have shape [..., C, N] with",
            ),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
    )
    def test_what_does_not_fit_is_named(self, change, error, message):
        named = dict(dirs=torch.zeros(2, 3, 3), coeffs=torch.zeros(3, 16, 3), degree=3)
        with pytest.raises(error) as raised:
            rayfuse.spherical_harmonics(**{**named, **change})
        assert f"spherical_harmonics: {message}" in str(raised.value)
