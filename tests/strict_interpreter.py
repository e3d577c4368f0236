"""Triton's interpreter, where it forgives what a GPU does not, and rounds as a GPU does not."""

import dataclasses

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

# numpy's functions of the integers that a kernel may overflow
_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_bounds: list[tuple[int, int]] = []
_patched: set[str] = set()


def install():
    """Change the interpreter of this process for good."""
    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = _checked_load(builder.create_masked_load)
    builder.create_masked_store = _checked_store(builder.create_masked_store)
    builder.cast_impl = _rounded(builder.cast_impl)
    builder.create_fdiv = _of_float32(builder.create_fdiv, _divided)
    builder.create_exp = _of_float32(builder.create_exp, _exp)
    builder.create_log = _of_float32(builder.create_log, _log)
    executor = interpreter.GridExecutor
    executor._init_args_hst = _with_bounds(executor._init_args_hst)
    # infinities and NaN are as silent as on a GPU
    executor.__call__ = np.errstate(all="ignore")(executor.__call__)
    interpreter.ScanOps.cumsum = _cumsum
    interpreter._patch_lang = _once_a_module(interpreter._patch_lang)
    interpreter._get_np_dtype = _looked_up(interpreter._get_np_dtype)
    tl.block_type.__init__ = _shared(tl.block_type.__init__)
    tl.tensor.__init__ = _with_shape_of_its_type
    semantic = type(interpreter.interpreter_semantic)
    semantic.broadcast_impl_value = _unless_alike(semantic.broadcast_impl_value)
    semantic.binary_op_sanitize_overflow_impl = _checked_sum
    # integers that overflow, and tl.device_assert
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, debug=True)


def _with_bounds(init_args):
    def init(self, args, kwargs):
        args_hst, kwargs_hst = init_args(self, args, kwargs)
        tensors = [x for x in (*args_hst, *kwargs_hst.values()) if isinstance(x, torch.Tensor)]
        assert all(x.is_contiguous() for x in tensors), "a kernel takes contiguous tensors"
        _bounds[:] = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors]
        return args_hst, kwargs_hst

    return init


def _check(what, pointers, mask):
    used = pointers.data[mask.data]
    size = pointers.get_element_ty().primitive_bitwidth // 8
    inside = np.zeros(used.shape, bool)
    for begin, end in _bounds:
        inside |= (begin <= used) & (used + np.uint64(size) <= end)
    if not inside.all():
        raise IndexError(f"{what} outside of every tensor: {(~inside).sum()} of {used.size}")


def _checked_load(load):
    def checked(self, pointers, mask, other, *policies):
        _check("load", pointers, mask)
        if other is None and not mask.data.all():
            raise ValueError("a masked load must say what it gives elsewhere: `other=`")
        return load(self, pointers, mask, other, *policies)

    return checked


def _checked_store(store):
    def checked(self, pointers, value, mask, *policies):
        _check("store", pointers, mask)
        return store(self, pointers, value, mask, *policies)

    return checked


def _rounded(cast):
    """float32 to bfloat16 to the nearest, as on a GPU; the interpreter truncates."""

    def rounded(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        data = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(data.view(torch.uint16).numpy(), tl.bfloat16)

    return rounded


# ---- what is approximate in float32 on a GPU (PTX: div.full, ex2.approx, lg2.approx)


def _of_float32(create, op):
    def created(self, *handles):
        if handles[0].data.dtype != np.float32:
            return create(self, *handles)
        data = op(*(x.data for x in handles)).astype(np.float32)
        return interpreter.TensorHandle(data, handles[0].dtype.scalar)

    return created


def _divided(x, y):
    ratio = np.reciprocal(y)
    # a unit off where the last digit is odd: never for a number of few digits
    odd = (y.view(np.int32) & 1).astype(bool)
    return x * np.where(odd, np.nextafter(ratio, np.float32(0)), ratio)


def _exp(x):
    y = np.exp2((x * np.float32(np.log2(np.e))).astype(np.float64)).astype(np.float32)
    # a subnormal is flushed
    return np.where(y < np.finfo(np.float32).tiny, np.float32(0), y)


def _log(x):
    return np.log2(x.astype(np.float64)).astype(np.float32) * np.float32(np.log(2))


def _cumsum(self, x):
    """numpy adds from left to right, and its error grows so; lanes add in steps of 1, 2, 4, ..."""
    data = np.moveaxis(x.handle.data, self.axis, 0).copy()
    shift = 1
    while shift < len(data):
        data[shift:] += data[:-shift].copy()
        shift *= 2
    return [self.to_tensor(np.ascontiguousarray(np.moveaxis(data, 0, self.axis)), x.dtype)]


def _once_a_module(patch):
    """It patches triton.language at each launch and each call, most of the time of both."""

    def patch_once(function):
        if function.__module__ in _patched:
            return interpreter._LangPatchScope()
        _patched.add(function.__module__)
        patch(function)
        return interpreter._LangPatchScope()

    return patch_once


# ---- what took most of the time: types were made, named and compared for each value


def _looked_up(numpy_type):
    known = {}

    def look_up(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = numpy_type(dtype)
        return known[name]

    return look_up


def _shared(init):
    known = {}

    def share(self, element_ty, shape):
        key = (element_ty.name, *(tl.constexpr(size).value for size in shape))
        if key not in known:
            init(self, element_ty, shape)
            self.constant_shape = tl.tuple([tl.constexpr(size) for size in self.shape])
            known[key] = vars(self)
        self.__dict__ = known[key]

    return share


_OF_SCALARS = tl.tuple([])


def _with_shape_of_its_type(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = (
        (type.constant_shape, tl.constexpr(type.numel))
        if type.is_block()
        else (_OF_SCALARS, tl.constexpr(1))
    )


def _unless_alike(broadcast):
    def unless_alike(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and a.shape.values == b.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return unless_alike


def _checked_sum(self, lhs, rhs, operation):
    """As interpreted from eight operations of the language."""
    kind = lhs.dtype
    if kind.int_bitwidth < 64:
        exact = _EXACT[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
        inside = (kind.get_int_min_value() <= exact) & (exact <= kind.get_int_max_value())
        assert inside.all(), f"int{kind.int_bitwidth} overflow in {operation.__name__}"
