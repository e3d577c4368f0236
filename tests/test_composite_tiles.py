"""What only tile compositing knows: its definition pixel by pixel, where pixels end, and what is
passed over."""

import math

import pytest
import torch

import rayfuse
from conftest import EMULATED
from contract import LINUX, Contract, as_tuple, resident
from rayfuse import backend
from rayfuse.ops.composite_tiles import TILE_PRESETS


def pixel_by_pixel(args, options):
    """The definition as a loop over pixels and splats: Kerbl et al. (2023), as gsplat has it; then
    the splats of the median depths, -1 where there is none, and of each pixel those that it
    composites with their weights."""
    names = rayfuse.composite_tiles.op.inputs
    given = {**dict(zip(names, args, strict=True)), **options}
    constants = {**TILE_PRESETS[given.get("preset", "gsplat15")], **given}
    width, height, size = (given[x] for x in ("image_width", "image_height", "tile_size"))
    means2d, conics, colors, opacities = (x.tolist() for x in args[:4])
    offsets, ids = args[4], args[5].tolist()
    images, Y, X = offsets.shape
    starts = [*offsets.flatten().tolist(), len(ids)]
    image = torch.zeros(images, height, width, args[2].shape[1], dtype=torch.float64)
    alpha, depth, median = torch.zeros(3, images, height, width, dtype=torch.float64)
    chosen, composited = torch.full((images, height, width), -1), []
    for i in range(images):
        for y in range(height):
            for x in range(width):
                tile = (i * Y + y // size) * X + x // size
                masks = given["masks"]
                seen = masks is None or bool(masks.flatten()[tile])
                T, color, far = 1.0, [0.0] * args[2].shape[1], 0.0
                composited.append([])
                for g in ids[starts[tile] : starts[tile + 1]] if seen else ():
                    dx = means2d[g][0] - (x + constants["pixel_center"])
                    dy = means2d[g][1] - (y + constants["pixel_center"])
                    a, b, c = conics[g]
                    sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
                    if not sigma >= 0:
                        continue
                    own = min(opacities[g] * math.exp(-sigma), constants["max_alpha"])
                    if own < 1 / 255:
                        continue
                    after = T * (1 - own)
                    if after <= 1e-4 if constants["stop_at_min"] else after < 1e-4:
                        break
                    composited[-1].append((g, own * T))
                    color = [s + own * T * v for s, v in zip(color, colors[g], strict=True)]
                    if given["depths"] is not None:
                        far += own * T * given["depths"][g].item()
                        if T > 0.5:
                            median[i, y, x] = given["depths"][g].item()
                            chosen[i, y, x] = g
                    T = after
                behind = 0.0
                if given["background"] is not None:
                    behind = T * given["background"][i].double()
                image[i, y, x] = torch.tensor(color, dtype=torch.float64) + behind
                alpha[i, y, x] = 1 - T
                depth[i, y, x] = far / (1 - T) if T < 1 else 0.0
    return image, alpha, depth, median, chosen, composited


class FullTiles(Contract):
    """What GPU figures are of: tiles of the size that everybody has."""

    op = rayfuse.composite_tiles
    variants: tuple[dict[str, object], ...] = (dict(tile_size=16, image_width=28, image_height=13),)
    gpu_sizes = tuple({"N": 32, "D": D, "Y": 1, "X": 2} for D in (3, 64))
    gpu_spills = {
        f"composite_tiles_bwd_kernel<4, {T}>": "8 bytes on sm_75 and sm_80, for a fourth block"
        for T in ("float", "__half", "__nv_bfloat16")
    }

    def inputs(self, leading=None, dtype=torch.float32, device="cpu", seed=0, **sizes):
        leading = self.leading if leading is None else leading
        return super().inputs((math.prod(leading),), dtype, device, seed, **sizes)

    def raw(self, args, variant):
        """The arguments of the raw op."""
        variant = {**(variant or self.variants[0])}
        preset = TILE_PRESETS[variant.pop("preset", "gsplat15")]
        return self.spec.raw_arguments(args, **{**preset, **variant})

    def d_outputs(self, args, variant=None, seed=1):
        _, sizes = self.spec.bind(self.raw(args, variant))
        generator = torch.Generator().manual_seed(seed)
        wide = torch.promote_types(args[0].dtype, torch.float32)
        return [
            (torch.rand(y.shape((), sizes), generator=generator) + 0.5).to(args[0].device, wide)
            for y in self.spec.signature.outputs
        ]


class TestCompositeTiles(FullTiles):
    # splats of an image, and their channels
    sizes = tuple({"N": N, "D": D, "Y": 1, "X": 1} for N, D in ((0, 3), (4, 0), (12, 5)))
    typical = {"N": 4, "D": 2, "Y": 1, "X": 1}
    leading = (4,)
    # the gradient of absgrad is not that of what it does
    small = dict(tile_size=4, image_width=4, image_height=3, absgrad=None)
    colour_alone = dict(small, depths=None)
    variants = (
        small,
        dict(small, preset="inria", min_alpha=0.2, depths=None, masks=None, background=None),
    )
    # images of 2 x 3 tiles
    wide = {"N": 6, "D": 2, "Y": 2, "X": 3}
    wide_variants = (
        dict(small, image_width=11, image_height=7),
        dict(small, tile_size=16, image_width=41, image_height=18, preset="inria", background=None),
        dict(small, tile_size=9, image_width=27, image_height=10, preset="gsplat", masks=None),
    )

    # ---- the definition

    def test_reference_is_the_definition_pixel_by_pixel(self):
        for v, variant in enumerate(self.wide_variants):
            args = self.inputs((2,), torch.float64, seed=v, **{**self.wide, "N": 40})
            # so that some pixels end, and some alphas are cut off
            args[3] = args[3].sqrt()
            args[3][:4] = 1
            with rayfuse.use_backend("ref"):
                got = self.outputs(args, variant)
            for ours, want in zip(got, pixel_by_pixel(args, variant)[:4], strict=True):
                torch.testing.assert_close(ours, want)

    def test_gradient_of_the_median_goes_to_the_depth_of_its_splat(self, forced_backend, device):
        at = self.spec.inputs.index("depths")
        emulated = forced_backend in EMULATED
        for v, variant in enumerate(self.wide_variants[: 1 if emulated else 3]):
            images, N = (1, 26) if emulated else (2, 40)
            args = self.inputs((images,), torch.float64, device, seed=v, **{**self.wide, "N": N})
            *_, median, chosen, _ = pixel_by_pixel([x.cpu() for x in args], variant)
            leaves = self.leaves(args)
            got = as_tuple(self.call(leaves, variant))[3]
            torch.testing.assert_close(got.cpu(), median)
            d_median = torch.rand(got.shape, dtype=got.dtype, generator=torch.manual_seed(v))
            wanted = [leaves[i] for i in self.differentiable()]
            d_median = d_median.to(device)
            grads = torch.autograd.grad(got, wanted, d_median, materialize_grads=True)
            met = chosen.flatten() >= 0
            want = torch.zeros(len(args[at]), dtype=torch.float64).index_add_(
                0, chosen.flatten()[met], d_median.cpu().flatten()[met]
            )
            for i, grad in zip(self.differentiable(), grads, strict=True):
                right = want.to(device) if i == at else torch.zeros_like(grad)
                torch.testing.assert_close(grad, right)

    def test_long_lists_are_as_right_as_torch(self, forced_backend, device):
        N = 26 if forced_backend in EMULATED else 100
        for variant in self.wide_variants:
            args = self.inputs((1,), device=device, seed=3, **{**self.wide, "N": N})
            self.assert_as_right_as_torch(args, variant=variant)

    @pytest.mark.parametrize("depth", [False, True])
    def test_colours_with_and_without_depth_are_as_right_as_torch(
        self, forced_backend, device, depth
    ):
        """Numbers of channels that kernels keep in registers."""
        args = self.inputs(device=device, seed=1, **{**self.typical, "N": 12, "D": 3})
        self.assert_as_right_as_torch(args, variant=self.small if depth else self.colour_alone)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
    def test_many_channels_are_as_right_as_torch(self, forced_backend, device, dtype):
        """More than a block of a GPU takes at once."""
        args = self.inputs((1,), device=device, N=6, D=37, Y=1, X=1)
        args[2] = args[2].to(dtype)
        self.assert_as_right_as_torch(args)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
    @pytest.mark.parametrize("isa", backend.isas())
    def test_channels_along_the_lanes_are_as_right_as_torch(self, isa, dtype):
        """Registers in fours, one by one, and a rest; rows that end within four neighbours."""
        args = self.inputs((2,), dtype, N=12, D=85, Y=1, X=1)
        variant = dict(tile_size=16, image_width=7, image_height=5)

        def of_opacity():
            """Gradients of an image that has none itself."""
            leaves = self.leaves(args)
            opacity = self.outputs(leaves, variant)[1]
            return torch.autograd.grad(opacity.sum(), leaves[:4], materialize_grads=True)

        with rayfuse.use_backend(f"cpu.{isa}"):
            self.assert_as_right_as_torch(args, variant=variant)
            grads = of_opacity()
        with rayfuse.use_backend("ref"):
            for ours, right in zip(grads, of_opacity(), strict=True):
                torch.testing.assert_close(ours, right)

    @LINUX
    @pytest.mark.parametrize("D", [64, 66])
    @pytest.mark.parametrize("isa", backend.isas())
    def test_large_image_is_that_of_its_channels(self, isa, D):
        """From 32 MB on it goes past the cache, to where one was before."""
        args = self.inputs((1,), N=60, D=D, Y=17, X=32)
        args[0], args[1] = 2 * args[0], args[1] / 4
        variant = dict(tile_size=16, image_width=510, image_height=270)
        names = self.spec.inputs

        def image(first, last):
            given = dict(zip(names, args, strict=True))
            for name in ("colors", "background"):
                given[name] = given[name][:, first:last].contiguous()
            return self.outputs([*given.values()], variant)[0]

        with rayfuse.use_backend(f"cpu.{isa}"):
            whole, again = image(0, D), image(0, D)
            parts = image(0, D // 2), image(D // 2, D)
        assert whole.nbytes > 32 << 20
        torch.testing.assert_close(whole, torch.cat(parts, -1))
        assert torch.equal(whole, again) and whole.data_ptr() != again.data_ptr()
        megabytes = 2 * whole.nbytes / (1 << 20)
        del whole, again
        before = resident()
        rayfuse.release_memory()
        assert before - resident() > 0.9 * megabytes

    # ---- what the contract says of rays, of images

    def test_gradients_pass_gradcheck(self, forced_backend, device):
        emulated = forced_backend in EMULATED
        args = self.leaves(self.inputs((2,), torch.float64, device, seed=1))
        for variant in self.variants[:1] if emulated else self.variants:
            assert torch.autograd.gradcheck(
                lambda *a: self.outputs(a, variant),  # noqa: B023
                args,
                fast_mode=True,
            )

    def test_second_derivatives_pass_gradgradcheck(self, forced_backend, device):
        args = self.leaves(self.inputs((1,), torch.float64, device, seed=1))
        assert torch.autograd.gradgradcheck(lambda *a: self.outputs(a), args, fast_mode=True)

    def test_result_is_the_same_to_the_bit_for_any_number_of_threads(self, forced_backend, device):
        images = 1 if forced_backend in EMULATED else 200
        args = self.inputs((images,), device=device)
        self.assert_the_same_for_any_number_of_threads(args, forced_backend)

    def test_expanded_inputs_and_gradients_are_read_right(self, forced_backend, device):
        args = self.inputs(dtype=torch.float64, device=device)
        wanted = self.differentiable()
        expanded = [x[:1].expand_as(x) if i in wanted else x for i, x in enumerate(args)]
        d_outputs = [d_y.double()[:1].expand_as(d_y) for d_y in self.d_outputs(args)]
        want = self.gradients([x.clone() for x in expanded], [d_y.clone() for d_y in d_outputs])
        for i in wanted:
            expanded[i].requires_grad_()
        outputs = self.outputs(expanded)
        grads = torch.autograd.grad(outputs, [expanded[i] for i in wanted], d_outputs)
        self.assert_equal((outputs, grads), want)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
    def test_bad_value_stays_in_its_own_ray(self, forced_backend, device, bad):
        """A splat that is not finite is passed over, and gets no gradient."""
        clean = self.inputs((2,), device=device)
        d_outputs = self.d_outputs(clean)
        without = [x.clone() for x in clean]
        without[3][3] = 0
        want = self.gradients(without, d_outputs)
        for i, name in enumerate(self.spec.inputs):
            if i not in self.differentiable() or name == "background":
                continue
            args = [x.clone() for x in clean]
            args[i][3].view(-1)[-1] = bad
            self.assert_equal(self.gradients(args, d_outputs), want, name)

    def test_nan_comes_out_as_nan(self, forced_backend, device):
        """Of a background; bad splats are passed over."""
        args = self.inputs((3,), device=device)
        args[self.spec.inputs.index("background")][1, 0] = torch.nan
        nans = self.outputs(args)[0].isnan()
        assert nans[1, ..., 0].any() and not nans[[0, 2]].any() and not nans[..., 1].any()

    def test_vmap_is_one_more_leading_dimension(self, forced_backend, device):
        batch = [torch.stack([x, x]) for x in self.inputs(device=device)]
        with pytest.raises(NotImplementedError, match="vmap needs leading dimensions"):
            torch.vmap(lambda *a: self.call(a))(*batch)

    def test_torch_func_gives_the_gradients_of_autograd(self, forced_backend, device):
        args = self.inputs(dtype=torch.float64, device=device)
        wanted = tuple(self.differentiable())
        grads = torch.func.grad(lambda *a: self.objective(a), wanted)(*args)
        _, want = self.gradients_of_objective(args)
        for ours, right in zip(grads, want, strict=True):
            torch.testing.assert_close(ours, right)

    # ---- what its callers rely on

    def test_leading_dimensions_are_images_packed_or_not(self, forced_backend, device):
        args = self.inputs((6,), device=device)
        images = (2, 3)
        unpacked = [
            x if name == "flatten_ids" else x.reshape(*images, -1, *x.shape[1:])
            for name, x in zip(self.spec.inputs, args, strict=True)
        ]
        for i, name in enumerate(self.spec.inputs):
            if name in ("tile_offsets", "masks", "background"):
                unpacked[i] = args[i].reshape(*images, *args[i].shape[1:])
        got, want = self.call(unpacked), self.call(args)
        for ours, right in zip(got, want, strict=True):
            assert ours.shape[:2] == images
            assert torch.equal(ours.flatten(0, 1), right)

    def test_background_of_each_pixel_is_that_of_images_spread_out(self, forced_backend, device):
        args = self.leaves(self.inputs((2,), device=device))
        at = self.spec.inputs.index("background")
        H, W = self.small["image_height"], self.small["image_width"]
        spread = args[at][:, None, None].expand(-1, H, W, -1)
        d_outputs = self.d_outputs(args)
        results = []
        for background in (args[at], spread):
            outputs = as_tuple(self.call([*args[:at], background, *args[at + 1 :]]))
            grads = torch.autograd.grad(outputs, [args[0], args[at]], d_outputs)
            results.append((*outputs, *grads))
        for ours, right in zip(*results, strict=True):
            torch.testing.assert_close(ours, right)

    def test_absgrad_adds_up_what_each_pixel_adds_to_the_gradient_of_means(
        self, forced_backend, device
    ):
        args = self.inputs((2,), torch.float64, device, **{**self.typical, "N": 6})
        d_outputs = self.d_outputs(args)
        with rayfuse.use_backend("ref"):
            leaves = self.leaves(args, [0])
            losses = [
                (y * d_y).flatten(3).sum(-1) if y.dim() > 3 else y * d_y
                for y, d_y in zip(self.outputs(leaves), d_outputs, strict=True)
            ]
            want = sum(
                torch.autograd.grad(loss, leaves[0], retain_graph=True)[0].abs()
                for loss in sum(losses).flatten()
            )
        leaves = self.leaves(args)
        # which is not read
        absgrad = torch.full_like(args[0], torch.nan).requires_grad_()
        outputs = self.outputs(leaves, {**self.small, "absgrad": absgrad})
        wanted = [leaves[i] for i in self.differentiable()]
        got, *grads = torch.autograd.grad(outputs, [absgrad, *wanted], d_outputs)
        torch.testing.assert_close(got, want)
        assert (got > grads[0].abs()).any()
        # and the others are what they were
        self.assert_equal((outputs, grads), self.gradients(args, d_outputs))

    def test_lists_in_int32_and_masks_of_bools_are_the_same(self, forced_backend, device):
        args = self.inputs((2,), device=device)
        narrow = [*args]
        for name, dtype in (
            ("tile_offsets", torch.int32),
            ("flatten_ids", torch.int32),
            ("masks", torch.bool),
        ):
            i = self.spec.inputs.index(name)
            narrow[i] = args[i].to(dtype)
        assert all(map(torch.equal, self.call(narrow), self.call(args)))

    def one_pixel(self, device, opacities, **options):
        """Splats that lie on the only pixel, at depths 1, 2, ..., with that colour."""
        n = len(opacities)
        where = torch.full((n, 2), options.get("pixel_center", 0.5), device=device)
        conic = torch.tensor([1.0, 0.0, 1.0], device=device).expand(n, 3)
        depths = torch.arange(1.0, n + 1, device=device)
        o = torch.tensor(opacities, device=device, requires_grad=True)
        offsets = torch.zeros(1, 1, dtype=torch.int64, device=device)
        ids = torch.arange(n, device=device)
        out = rayfuse.composite_tiles(
            where, conic, depths[:, None], o, offsets, ids, depths=depths,
            image_width=1, image_height=1, **options,
        )  # fmt: skip
        return out, o

    def test_alpha_at_its_limit_gives_no_gradient_to_the_opacity(self, forced_backend, device):
        out, o = self.one_pixel(device, [1.0, 0.5])
        out.alpha.sum().backward()
        torch.testing.assert_close(o.grad, torch.tensor([0.0, 0.001], device=device))
        torch.testing.assert_close(out.alpha.item(), 1 - 0.0005)

    @pytest.mark.parametrize(
        ("opacities", "median"),
        [
            ([0.25, 0.25, 0.25, 0.25], 3),  # T of the third is 9/16, of the fourth 27/64
            ([0.5, 0.25], 1),  # T of the second is 1/2
            ([0.25, 0.125], 2),  # half of the light is never stopped
            ([0.001, 0.75, 0.75], 2),  # the first is passed over
            ([0.001], 0),
            ([0.02] * 40, 35),
        ],
        ids=lambda x: str(x)[:18],
    )
    def test_median_is_the_last_splat_that_more_than_half_of_the_light_comes_to(
        self, forced_backend, device, opacities, median
    ):
        out, _ = self.one_pixel(device, opacities)
        assert out.median_depth.item() == median

    def test_second_splat_at_the_limit_ends_the_pixel_of_gsplat(self, forced_backend, device):
        """(1 - 0.99)^2 <= 1e-4 in float32: it is left out, and so is what follows."""
        background = torch.full((1,), 100.0, device=device)
        out, _ = self.one_pixel(device, [1.0, 1.0, 0.5], preset="gsplat", background=background)
        torch.testing.assert_close(out.colors.item(), 0.99 + 0.01 * 100, rtol=1e-5, atol=0)
        torch.testing.assert_close(out.depth.item(), 1.0)
        torch.testing.assert_close(out.alpha.item(), 0.99)

    @pytest.mark.parametrize(("stop_at_min", "count"), [(True, 1), (False, 2)])
    def test_reaching_the_least_transmittance_ends_a_pixel_or_not(
        self, forced_backend, device, stop_at_min, count
    ):
        out, o = self.one_pixel(
            device, [0.5, 0.5, 0.5], min_transmittance=0.25, stop_at_min=stop_at_min
        )
        torch.testing.assert_close(out.alpha.item(), 1 - 0.5**count)
        out.alpha.sum().backward()
        met = torch.arange(3, device=device) < count
        torch.testing.assert_close(o.grad, met * 0.5 ** (count - 1))

    def test_background_shows_where_masks_are_false(self, forced_backend, device):
        args = self.inputs((1,), device=device, **self.wide)
        masks = torch.zeros(1, 2, 3, dtype=torch.bool, device=device)
        masks[0, 0, 1] = True
        at = {name: self.spec.inputs.index(name) for name in ("masks", "background")}
        args[at["masks"]] = masks
        leaves = self.leaves(args)
        out = self.call(leaves, self.wide_variants[0])
        hidden = torch.ones(7, 11, dtype=torch.bool, device=device)
        hidden[:4, 4:8] = False
        background = args[at["background"]][0]
        assert torch.equal(out.colors[0, hidden], background.expand(int(hidden.sum()), -1))
        assert (out.alpha[0, hidden] == 0).all() and out.alpha.max() > 0
        d_image = hidden[None, ..., None] * torch.ones_like(out.colors)
        grads = torch.autograd.grad(
            out.colors, [leaves[0], leaves[at["background"]]], d_image, materialize_grads=True
        )
        assert (grads[0] == 0).all()
        torch.testing.assert_close(grads[1], torch.full_like(grads[1], float(hidden.sum())))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(image_width=17), "tile_offsets must have shape [..., 1, 5], got"),
            (dict(image_height=0), "image_height must be >= 1, got 0"),
            (dict(tile_size=17), "tile_size must be from 1 to 16, got 17"),
            (dict(preset="3dgs"), "preset must be one of gsplat15, gsplat, inria, got '3dgs'"),
            (dict(max_alpha=1.5), "max_alpha must be > 0 and <= 1, got 1.5"),
            (dict(background=torch.zeros(3, 2)), "background must have shape [2, D] or [24, D]"),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
    )
    def test_what_does_not_fit_is_named(self, change, message):
        with pytest.raises(ValueError) as raised:
            self.call(self.inputs((2,)), {**self.small, **change})
        assert message in str(raised.value)

    def test_lists_that_lead_out_of_bounds_are_named(self, forced_backend, device):
        args = self.inputs((2,), device=device)
        M, P = len(args[5]), len(args[0])
        wrong = [(4, (0, 0, 0), 1), (4, (1, 0, 0), -1), (4, (1, 0, 0), M + 1)]
        wrong += [(5, (0,), -1), (5, (M - 1,), P)]
        for i, place, value in wrong:
            bad = [*args]
            bad[i] = args[i].clone()
            bad[i][place] = value
            with rayfuse.debug(), pytest.raises(ValueError, match=f"{self.spec.inputs[i]} must"):
                self.call(bad)
            if forced_backend == "ref" or forced_backend.startswith("cpu"):
                with pytest.raises(ValueError, match=f"{self.spec.inputs[i]} must"):
                    self.call(bad)
