"""The dims string: its grammar, what it binds, and what it says of a misfit."""

import pytest
import torch

import rayfuse
from rayfuse.dims import ShapeError, Signature

PAIR = Signature.parse("t[..., S+1] w[..., S] -> loss[...]")


def test_sizes_are_found_where_they_first_occur():
    assert PAIR.bind([(2, 3, 5), (2, 3, 4)]) == ((2, 3), {"S": 4})


def test_leading_dimensions_may_be_none():
    assert PAIR.bind([(1,), (0,)]) == ((), {"S": 0})


def test_output_shapes_follow():
    sig = Signature.parse("w[..., S] f[..., S, C] k[3] -> out[..., C] mean[C-1]")
    leading, sizes = sig.bind([(7, 2), (7, 2, 64), (3,)])
    assert [a.shape(leading, sizes) for a in sig.outputs] == [(7, 64), (63,)]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(), (1,)], "t must have shape [..., S+1] with S >= 0, got []"),
        ([(2, 0), (2, 0)], "t must have shape [..., S+1] with S >= 0, got [2, 0]"),
        ([(2, 5), (2, 5)], "w must have shape [..., S] with ...=[2], S=4 (from t), got [2, 5]"),
        ([(2, 5), (3, 4)], "w must have shape [..., S] with ...=[2], S=4 (from t), got [3, 4]"),
        ([(2, 5), (4,)], "w must have shape [..., S] with ...=[2], S=4 (from t), got [4]"),
    ],
)
def test_misfit_names_what_is_needed_and_where_it_comes_from(shapes, message):
    with pytest.raises(ShapeError) as error:
        PAIR.bind(shapes)
    assert str(error.value) == message


def test_array_without_leading_dimensions_takes_none():
    with pytest.raises(ShapeError, match=r"k must have shape \[3\], got \[1, 3\]"):
        Signature.parse("w[..., S] k[3] -> out[...]").bind([(7, 2), (1, 3)])


def test_misfit_names_the_input_that_each_size_comes_from():
    sig = Signature.parse("t[..., S+1] t_env[..., E+1] w_env[..., E] f[..., S, E, C] -> out[...]")
    with pytest.raises(ShapeError) as error:
        sig.bind([(2, 5), (2, 9), (2, 7), (2, 4, 8, 3)])
    want = "w_env must have shape [..., E] with ...=[2] (from t), E=8 (from t_env), got [2, 7]"
    assert str(error.value) == want
    with pytest.raises(
        ShapeError, match=r"with ...=\[2\], S=4 \(from t\), E=8 \(from t_env\), got"
    ):
        sig.bind([(2, 5), (2, 9), (2, 8), (2, 4, 7, 3)])


@pytest.mark.parametrize("text", ["t[S]", "t[s] -> x[]", "t[S*2] -> x[]", "t[..., ...] -> x[]"])
def test_what_breaks_the_grammar_is_refused(text):
    with pytest.raises(ValueError, match="dim"):
        Signature.parse(text)


@pytest.mark.parametrize(
    ("ray_indices", "rays", "error", "message"),
    [
        (
            torch.tensor([0, 2, 1]),
            3,
            ValueError,
            r"be from 0 to 2, got 1 at \[2\]",
        ),
        (torch.tensor([0, 3]), 3, ValueError, r"got 3 at \[1\]"),
        (torch.tensor([-1, 0]), 3, ValueError, r"got -1 at \[0\]"),
        (torch.tensor([[0]]), 3, ValueError, r"have shape \[P\], got \[1, 1\]"),
        (torch.tensor([0]), -1, ValueError, "rays must be >= 0, got -1"),
        (torch.tensor([0.0]), 3, TypeError, "be an int64 tensor, got float32"),
        (torch.tensor([0]), 3.0, TypeError, "rays must be an integer, got float"),
    ],
    ids=str,
)
def test_bad_ray_indices_are_named(ray_indices, rays, error, message):
    with pytest.raises(error, match=f"ray_offsets: .*{message}"):
        rayfuse.ray_offsets(ray_indices, rays)
