"""What only covariances of splats know: rotations by quaternions, inverses, and splats without
rotation or extent."""

import pytest
import torch

import rayfuse
from contract import Contract


class TestSplatCovariances(Contract):
    op = rayfuse.splat_covariances
    sizes = ({}, {}, {})
    leading = (7,)
    variants = (
        dict(triu=True),
        dict(triu=False),
        dict(triu=True, inverse=True),
        dict(triu=False, inverse=True),
    )
    gpu_sizes = ({},)

    def d_outputs(self, args, variant=None, seed=1):
        variant = self.variants[0] if variant is None else variant
        generator = torch.Generator().manual_seed(seed)
        shape = (*args[0].shape[:-1], *((6,) if variant.get("triu") else (3, 3)))
        wide = torch.promote_types(args[0].dtype, torch.float32)
        return [(torch.rand(shape, generator=generator) + 0.5).to(args[0].device, wide)]

    @pytest.mark.parametrize("N", [127, 128, 129, 300], ids=str)
    def test_many_splats_are_as_right_as_torch(self, forced_backend, device, N):
        for variant in self.variants[:2]:
            self.assert_as_right_as_torch(self.inputs((N,), device=device), variant=variant)

    def test_columns_turn_as_quaternions_say(self, forced_backend, device):
        """q v q* of the axes, by products of quaternions."""
        quats, scales = self.inputs((9,), torch.float64, device)
        unit = quats / quats.norm(dim=-1, keepdim=True)

        def product(p, q):
            (a, u), (b, v) = ((x[..., :1], x[..., 1:]) for x in (p, q))
            real = a * b - (u * v).sum(-1, keepdim=True)
            return torch.cat([real, a * v + b * u + torch.linalg.cross(u, v)], -1)

        axes = torch.eye(3, dtype=torch.float64, device=device).expand(9, 3, 3)
        pure = torch.cat([torch.zeros_like(axes[..., :1]), axes], -1)
        conjugate = unit * torch.tensor([1.0, -1, -1, -1], device=device)
        both = (x[:, None].expand_as(pure) for x in (unit, conjugate))
        first, last = both
        turned = product(product(first, pure), last)[..., 1:].mT
        want = turned @ torch.diag_embed(scales**2) @ turned.mT
        torch.testing.assert_close(rayfuse.splat_covariances(quats, scales), want)

    def test_inverse_is_the_inverse(self, forced_backend, device):
        args = self.inputs((9,), torch.float64, device)
        product = rayfuse.splat_covariances(*args) @ rayfuse.splat_covariances(*args, inverse=True)
        torch.testing.assert_close(product, torch.eye(3).to(product).expand(9, 3, 3))

    def test_triangle_is_that_of_the_matrix(self, forced_backend, device):
        args = self.inputs((9,), device=device)
        rows, columns = torch.triu_indices(3, 3, device=device)
        for inverse in (False, True):
            whole = rayfuse.splat_covariances(*args, inverse=inverse)
            assert torch.equal(whole, whole.mT)
            triangle = rayfuse.splat_covariances(*args, inverse=inverse, triu=True)
            assert torch.equal(whole[:, rows, columns], triangle)

    def test_length_of_a_quaternion_does_not_count(self, forced_backend, device):
        quats, scales = self.inputs((9,), torch.float64, device)
        quats.requires_grad_()
        covariances = rayfuse.splat_covariances(quats, scales)
        torch.testing.assert_close(rayfuse.splat_covariances(-1e-9 * quats, scales), covariances)
        weights = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).to(covariances)
        (d_quats,) = torch.autograd.grad((weights * covariances).sum(), quats)
        along = (d_quats * quats).sum(-1)
        torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-12, rtol=0)

    @pytest.mark.parametrize("length", [0.0, 1e-30], ids=str)
    def test_quaternion_without_length_does_not_rotate(self, forced_backend, device, length):
        quats, scales = self.inputs((9,), device=device)
        quats[4] = torch.tensor([0.0, length, 0.0, 0.0], device=device)
        for variant in self.variants[1::2]:
            (out,), (d_quats, d_scales) = self.gradients([quats, scales], variant=variant)
            power = -2 if variant.get("inverse") else 2
            torch.testing.assert_close(out[4], torch.diag(scales[4] ** power))
            assert (d_quats[4] == 0).all() and d_scales.isfinite().all()

    def test_splat_without_extent_has_its_pseudo_inverse(self, forced_backend, device):
        quats, scales = self.inputs((3,), torch.float64, device)
        scales[1, 2], scales[2] = 0, 0
        (out,), (d_quats, d_scales) = self.gradients([quats, scales], variant=self.variants[3])
        covariances = rayfuse.splat_covariances(quats, scales)
        torch.testing.assert_close(out, torch.linalg.pinv(covariances, hermitian=True))
        assert d_scales[1, 2] == 0 and (d_scales[2] == 0).all() and (d_quats[2] == 0).all()
        assert d_quats.isfinite().all() and (d_scales[1, :2] != 0).all()
        _, (d_quats, d_scales) = self.gradients([quats, scales], variant=self.variants[1])
        assert (d_scales[2] == 0).all() and d_quats.isfinite().all()
