"""Triton's interpreter, where it forgives what a GPU does not, and rounds as a GPU does not."""

import dataclasses

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_bounds: list[tuple[int, int]] = []
_patched: set[str] = set()


def install():
    """Change the interpreter of this process for good."""
    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = _checked_load(builder.create_masked_load)
    builder.create_masked_store = _checked_store(builder.create_masked_store)
    builder.cast_impl = _rounded(builder.cast_impl)
    executor = interpreter.GridExecutor
    executor._init_args_hst = _with_bounds(executor._init_args_hst)
    # infinities and NaN are as silent as on a GPU
    executor.__call__ = np.errstate(all="ignore")(executor.__call__)
    interpreter.ScanOps.cumsum = _cumsum
    interpreter._patch_lang = _once_a_module(interpreter._patch_lang)
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
