"""What triton's interpreter forgives and a GPU does not: each planted error must be found."""

import pytest
import torch

from rayfuse import backend

if not backend.interpreting():
    pytest.skip("triton runs on a GPU here, or is not installed", allow_module_level=True)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def copy_kernel(out_ptr, x_ptr, R, READ: tl.constexpr, WRITTEN: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + r, mask=r < READ, other=0.0)
    tl.store(out_ptr + r, x, mask=r < WRITTEN)


@triton.jit
def backwards_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)
    tl.store(out_ptr + r, tl.load(x_ptr + r - 1))


@triton.jit
def no_other_kernel(out_ptr, x_ptr, R, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)
    tl.store(out_ptr + r, tl.load(x_ptr + r, mask=r < R), mask=r < R)


@triton.jit
def narrow_index_kernel(out_ptr, x_ptr, R):
    tl.store(out_ptr, tl.load(x_ptr + R * R))


@triton.jit
def assert_kernel(out_ptr):
    tl.device_assert(tl.program_id(0) > 0)


@triton.jit
def arithmetic_kernel(out_ptr, x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, 1 / x)
    tl.store(out_ptr + N + i, tl.div_rn(1.0, x))
    tl.store(out_ptr + 2 * N + i, tl.exp(-x))
    tl.store(out_ptr + 3 * N + i, tl.log(x))


@pytest.fixture
def tensors():
    return torch.empty(10), torch.rand(10)


def test_access_inside_passes(tensors):
    out, x = tensors
    copy_kernel[(1,)](out, x, 10, 10, 10, 16)
    assert torch.equal(out, x)


@pytest.mark.parametrize(
    "what, read, written", [("load", 11, 10), ("store", 10, 11), ("load", 16, 10)]
)
def test_access_past_the_end_is_found(tensors, what, read, written):
    with pytest.raises(
        Exception, match=f"{what} outside of every tensor: {max(read, written) - 10}"
    ):
        copy_kernel[(1,)](*tensors, 10, read, written, 16)


def test_access_before_the_start_is_found(tensors):
    with pytest.raises(Exception, match="load outside of every tensor: 1 of 8"):
        backwards_kernel[(1,)](*tensors, 8)


def test_part_of_a_tensor_is_not_the_whole():
    """A view's own memory counts, not that of the tensor it is a view of."""
    out, x = torch.empty(20)[:10], torch.rand(20)[:10]
    with pytest.raises(Exception, match="load outside"):
        copy_kernel[(1,)](out, x, 10, 11, 10, 16)


def test_masked_load_without_other_is_found(tensors):
    with pytest.raises(Exception, match="a masked load must say"):
        no_other_kernel[(1,)](*tensors, 10, 16)


def test_strided_tensor_is_found():
    with pytest.raises(Exception, match="a kernel takes contiguous tensors"):
        copy_kernel[(1,)](torch.empty(10), torch.rand(20)[::2], 10, 10, 10, 16)


def test_index_that_overflows_32_bits_is_found(tensors):
    with pytest.raises(Exception, match="overflow"):
        narrow_index_kernel[(1,)](*tensors, 1 << 17)


def test_device_assert_is_heard(tensors):
    with pytest.raises(Exception, match="AssertionError"):
        assert_kernel[(1,)](tensors[0])


def test_bfloat16_is_rounded_to_the_nearest():
    x = torch.tensor([1.999, 1e-40, -3e38, torch.inf, torch.nan, 1.00390625, 1.01171875])
    out = torch.empty(7, dtype=torch.bfloat16)
    copy_kernel[(1,)](out, x, 7, 7, 7, 8)
    assert torch.equal(out.view(torch.int16), x.bfloat16().view(torch.int16))


def test_division_exp_and_log_of_float32_are_as_coarse_as_on_a_gpu():
    x = 1 + 59 * torch.rand(1024, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = 4, 88
    out = torch.empty(4, 1024)
    arithmetic_kernel[(1,)](out, x, 1024)
    wide = x.double()
    true = torch.stack([1 / wide, 1 / wide, torch.exp(-wide), torch.log(wide)])
    quotient, rounded, exp, log = (out / true - 1).abs() / torch.finfo(torch.float32).eps
    assert 0.6 < quotient.max() < 2 and quotient[0] == 0
    # div_rn rounds once
    assert rounded.max() <= 0.5
    # digits are lost as the argument grows, and what would be subnormal is 0
    assert 10 < exp[2:].max() < 64 and out[2, 1] == 0 < true[2, 1]
    assert 0.6 < log.max() < 3
