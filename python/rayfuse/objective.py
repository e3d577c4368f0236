"""The whole objective of a feature field from what its levels hold: the ops, put together.

There is no kernel of this name. Weights are computed once and read by every op; one kernel for all
terms would move the same bytes but for the weights, and was measured not to be faster
(docs/objective.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from . import dims, ops
from .backend import sum_of_rays
from .one_pass import Calls, weighted_sum
from .op import HALVES, Passed, check_reduction, is_transformed, ray_count, reduced

_SHAPES = dims.Signature.parse(
    "sigma[..., S] t[..., S+1] rgb?[..., S, C] features?[..., S, D] s?[..., S+1]"
    " rgb_target?[..., C] features_target?[..., D] -> losses[...]"
)
_NORMAL_SHAPES = dims.Signature.parse(
    "sigma[..., S] n?[..., S, 3] n_pred?[..., S, 3] d?[..., 3] -> losses[...]"
)
_PACKED_SHAPES = dims.Signature.parse(
    "sigma[P] t_starts[P] t_ends[P] offsets[R+1] rgb?[P, C] features?[P, D] s_starts?[P] s_ends?[P]"
    " rgb_target?[R, C] features_target?[R, D] -> losses[R]"
)
_PACKED_NORMAL_SHAPES = dims.Signature.parse(
    "sigma[P] offsets[R+1] n?[P, 3] n_pred?[P, 3] d?[R, 3] -> losses[R]"
)


class FieldLosses(NamedTuple):
    """What `field_losses` and `packed_field_losses` return: losses, 0 where they are switched off,
    and renderings."""

    rgb_loss: Tensor
    feature_loss: Tensor
    orientation_loss: Tensor
    predicted_normal_loss: Tensor
    distortion_loss: Tensor
    interlevel_loss: Tensor
    rgb: Tensor  # [..., C]
    depth: Tensor  # [...]
    accumulation: Tensor  # [...]
    weights: Tensor  # [..., S], or [P]


LOSSES = FieldLosses._fields[:6]


def field_losses(
    sigma: Tensor,
    t: Tensor,
    *,
    rgb: Tensor | None = None,
    rgb_target: Tensor | None = None,
    features: Tensor | None = None,
    features_target: Tensor | None = None,
    n: Tensor | None = None,
    d: Tensor | None = None,
    n_pred: Tensor | None = None,
    normal_rays: int | None = None,
    s: Tensor | None = None,
    proposals: Sequence[tuple[Tensor, Tensor]] = (),
    background: Tensor | float | None = None,
    last_sample: bool = False,
    depth: Literal["expected", "log_mean", "median", "none"] = "expected",
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    _calls: Calls | None = None,
) -> FieldLosses:
    """Every term of the objective of F3RM on nerfacto, unweighted, and what the rays render to.

    A term whose tensors are not all there costs nothing and is 0. Gradients flow as in nerfstudio:
    of the normals' losses none to the weights, and of the predicted normals' none to n; of the
    interlevel loss to the proposals alone. That of the predicted normals costs one pass more where
    n wants a gradient (docs/objective.md).

    Args:
        sigma: [..., S] densities of the final level, as in `ray_weights`.
        t: [..., S+1] edges of its intervals, not decreasing, in the unit of depth.

    Keyword Args:
        rgb, rgb_target: [..., S, C] and [..., C] colours of the samples, and those wanted: of
            RGBA targets `blend_background` makes them.
        features, features_target: [..., S, D] and [..., D] features to distil. These and rgb may be
            of half precision beside float32.
        n, d, n_pred: [..., S, 3] normals, [..., 3] directions of the rays, [..., S, 3] predicted
            normals. n and d give the orientation loss, n and n_pred that of the predicted normals.
        normal_rays: how many rays n, d and n_pred are of, the first of the first dimension; None
            for all. A mean of these losses is over as many.
        s: [..., S+1] the edges in normalised distance; they give the distortion loss.
        proposals: for each level (s_env [..., E+1], w_env [..., E]), its edges in the unit of s and
            its weights; they give the interlevel loss, the sum over the levels.
        background, last_sample, depth: as in `composite_rays`. A random background is a tensor
            [..., C], which the targets are blended with as well.
        reduction, denominator: of every loss over the rays, as in all losses.

    Returns:
        FieldLosses: six losses, 0-d, or [...] with `reduction="none"`; the rendered rgb [..., C],
        depth [...], accumulation [...], and the weights [..., S]. All are differentiable.

    Raises:
        ValueError: for shapes or devices that do not match, and for proposals without s.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ.

    Source:
        Shen et al., F3RM (2023); Tancik et al., Nerfstudio (2023), `NerfactoModel.get_loss_dict`.

    Example:
        >>> import torch, rayfuse
        >>> t = torch.tensor([0.0, 1.0, 2.0])
        >>> out = rayfuse.field_losses(torch.tensor([0.0, torch.inf]), t, s=t / 2, rgb=torch.eye(2),
        ...     rgb_target=torch.tensor([0.5, 1.0]))
        >>> out.rgb_loss, out.distortion_loss, out.depth
        (tensor(0.1250), tensor(0.1667), tensor(1.5000))
    """
    _check("field_losses", _SHAPES, sigma, t, rgb, features, s, rgb_target, features_target)
    some = None if normal_rays is None else slice(normal_rays)
    _check("field_losses", _NORMAL_SHAPES, _some(sigma, some), n, n_pred, d)
    if s is None and proposals:
        raise ValueError("field_losses: s must be given with proposals, got None")

    return _objective(
        *(_calls, _dense, sigma, (t,), rgb, rgb_target, features, features_target),
        normals=_Normals(_dense, some, n, d, n_pred),
        s=None if s is None else (s,),
        proposals=proposals,
        rendering=dict(background=background, last_sample=last_sample, depth=depth),
        options=dict(reduction=reduction, denominator=denominator),
    )


def packed_field_losses(
    sigma: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    offsets: Tensor,
    *,
    rgb: Tensor | None = None,
    rgb_target: Tensor | None = None,
    features: Tensor | None = None,
    features_target: Tensor | None = None,
    n: Tensor | None = None,
    d: Tensor | None = None,
    n_pred: Tensor | None = None,
    normal_rays: int | None = None,
    s_starts: Tensor | None = None,
    s_ends: Tensor | None = None,
    background: Tensor | float | None = None,
    last_sample: bool = False,
    depth: Literal["expected", "log_mean", "median", "none"] = "expected",
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    _calls: Calls | None = None,
) -> FieldLosses:
    """`field_losses` of packed rays, whose samples an occupancy grid chose: no interlevel loss.

    Args:
        sigma: [P] densities of the samples, as in `packed_ray_weights`.
        t_starts, t_ends: [P] where their intervals begin and end, those of a ray in order.
        offsets: [R+1] int64: ray r has samples offsets[r] up to offsets[r + 1]. They rise from 0
            to P.

    Keyword Args:
        rgb, rgb_target: [P, C] and [R, C].
        features, features_target: [P, D] and [R, D].
        n, d, n_pred: [P', 3], [R', 3] and [P', 3], of the samples of the first R' rays.
        normal_rays: R', or None where that is R.
        s_starts, s_ends: [P] the intervals in normalised distance; they give the distortion loss.
        background, last_sample, depth: as in `packed_composite_rays`.
        reduction, denominator: as in `field_losses`.

    Returns:
        FieldLosses, the weights [P]; the rest as in `field_losses`.

    Raises:
        ValueError: for shapes or devices that do not match, and for offsets on the CPU that do not
            rise from 0 to P.
        TypeError: for dtypes other than float64, float32, bfloat16, float16, or that differ, and
            for offsets that are not int64.

    Source:
        That of `field_losses`, on the packed rays of Li et al., NerfAcc (2023).

    Example:
        >>> import torch, rayfuse
        >>> t, offsets = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 2, 2, 3])
        >>> sigma = torch.tensor([0.0, torch.inf, torch.inf])
        >>> out = rayfuse.packed_field_losses(sigma, t, t + 1, offsets, rgb=torch.eye(3),
        ...     rgb_target=torch.eye(3))
        >>> out.rgb_loss, out.depth
        (tensor(0.3333), tensor([1.5000, 0.0000, 0.5000]))
    """
    _check(
        *("packed_field_losses", _PACKED_SHAPES, sigma, t_starts, t_ends, offsets),
        *(rgb, features, s_starts, s_ends, rgb_target, features_target),
    )
    # of so many rays: offsets tell as well, where a look at them would synchronise
    samples = None if n is None else slice(len(n))
    normal_offsets = offsets if normal_rays is None else offsets[: normal_rays + 1]
    _check(
        *("packed_field_losses", _PACKED_NORMAL_SHAPES, _some(sigma, samples), normal_offsets),
        *(n, n_pred, d),
    )
    return _objective(
        *(_calls, _packed(offsets), sigma, (t_starts, t_ends)),
        *(rgb, rgb_target, features, features_target),
        normals=_Normals(_packed(normal_offsets), samples, n, d, n_pred),
        s=None if s_starts is None or s_ends is None else (s_starts, s_ends),
        proposals=(),
        rendering=dict(background=background, last_sample=last_sample, depth=depth),
        options=dict(reduction=reduction, denominator=denominator),
    )


def field_objective(
    multipliers: Mapping[str, float], *args: Any, **named: Any
) -> tuple[Tensor, FieldLosses]:
    """The sum of `field_losses`, each times its multiplier, and its gradients in the same pass.

    On a CPU the forward makes the gradients as well, each op its own while its inputs are in cache;
    the features', the largest, are written while the features are read. `loss.backward()` hands
    them over, times a number if the loss was. Everything that is returned is differentiable, but
    where more than the loss has a gradient, or a loss of half precision tensors was scaled, the
    backward computes all of it again, and warns: `field_losses` is for that. On other devices, for
    `reduction="none"` and under torch.compile this is the sum of what `field_losses` returns.

    Args:
        multipliers: a number for each loss that counts, by its name in `FieldLosses`.
        *args, **named: those of `field_losses`.

    Returns:
        (loss, FieldLosses): the sum, 0-d, or [...] with `reduction="none"`, and what it is of.

    Raises:
        ValueError, TypeError: as `field_losses`, and for multipliers of other names, or of none.

    Source:
        That of `field_losses`. Gradients in the forward: as Hsu et al., Liger Kernel (2024), make
        those of a language model's loss.

    Example:
        >>> import torch, rayfuse
        >>> t, sigma = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 2.0], requires_grad=True)
        >>> loss, out = rayfuse.field_objective(dict(rgb_loss=1, distortion_loss=0.01), sigma, t,
        ...     s=t / 2, rgb=torch.eye(2), rgb_target=torch.tensor([0.5, 1.0]))
        >>> loss.backward()
        >>> loss.item(), sigma.grad
        (0.1215..., tensor([ 0.1858, -0.0386]))
    """
    return _weighted("field_objective", field_losses, multipliers, args, named)


def packed_field_objective(
    multipliers: Mapping[str, float], *args: Any, **named: Any
) -> tuple[Tensor, FieldLosses]:
    """`field_objective` of packed rays: the sum of `packed_field_losses`.

    Args:
        multipliers: as in `field_objective`.
        *args, **named: those of `packed_field_losses`.

    Returns:
        (loss, FieldLosses), as `field_objective`.

    Raises:
        ValueError, TypeError: as `packed_field_losses`, and for multipliers of other names, or of
            none.

    Source:
        That of `field_objective`.

    Example:
        >>> import torch, rayfuse
        >>> t, offsets = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 2, 2, 3])
        >>> loss, _ = rayfuse.packed_field_objective(dict(rgb_loss=2), t, t, t + 1, offsets,
        ...     rgb=torch.eye(3), rgb_target=torch.eye(3))
        >>> loss
        tensor(0.7555)
    """
    return _weighted("packed_field_objective", packed_field_losses, multipliers, args, named)


def _weighted(
    function: str,
    of: Any,
    multipliers: Mapping[str, float],
    args: tuple[Any, ...],
    named: dict[str, Any],
) -> tuple[Tensor, FieldLosses]:
    if not multipliers or not set(multipliers) <= set(LOSSES):
        rule = "name one or more of " + ", ".join(LOSSES)
        raise ValueError(f"{function}: multipliers must {rule}, got {[*multipliers]}")
    for name, x in multipliers.items():
        if not isinstance(x, (int, float)):
            rule = f"hold numbers, got {type(x).__name__} for {name}"
            raise TypeError(f"{function}: multipliers must {rule}")
    loss, out = weighted_sum(of, multipliers, args, named)
    return loss, FieldLosses(*out)


_passed = Passed()


def _check(function: str, signature: dims.Signature, *tensors: Tensor | None) -> None:
    shapes = tuple([x if x is None else x.shape for x in tensors])
    if not is_transformed() and (function, shapes) in _passed:
        return
    try:
        signature.bind(shapes)
    except dims.ShapeError as error:
        raise ValueError(f"{function}: {error}") from None
    if not is_transformed():
        _passed.add((function, shapes))


Form = Callable[..., tuple[Any, ...]]
"""An op of this name, and its arguments."""


def _dense(name: str, *args: Any) -> tuple[Any, ...]:
    return getattr(ops, name), *args


def _packed(offsets: Tensor) -> Form:
    """The packed form of an op, whose tensors end with the offsets."""

    def form(name: str, *args: Any) -> tuple[Any, ...]:
        return getattr(ops, f"packed_{name}"), *args, offsets

    return form


def _like(w: Tensor, sigma: Tensor, *tensors: Any) -> list[Any]:
    """Tensors of half precision in float32 where w, of half precision densities, is."""
    if w.dtype == sigma.dtype:
        return [*tensors]
    return [x.to(w.dtype) if isinstance(x, Tensor) else x for x in tensors]


class _SquaredError:
    """The mean over the channels: torch has it, and no kernel of ours could read less."""

    def __call__(
        self, rgb: Tensor, rgb_target: Tensor, reduction: str, denominator: float | Tensor | None
    ) -> Tensor:
        each = F.mse_loss(rgb, self._wanted(rgb, rgb_target), reduction="none")
        if reduction == "none":
            return each.mean(-1)
        return reduced(each, "mean", self._count(each, reduction, denominator))

    def with_gradients(
        self,
        multiplier: float | None,
        rgb: Tensor,
        rgb_target: Tensor,
        reduction: str,
        denominator: float | None,
    ) -> tuple[float, list[Tensor]]:
        """The loss, a number, and what its multiple gives rgb and rgb_target, if it has one."""
        error = rgb - self._wanted(rgb, rgb_target)
        count = self._count(error, reduction, denominator)
        loss = sum_of_rays(error * error).item() / count
        if multiplier is None:
            return loss, []
        d_rgb = error * (2 * multiplier / count)
        return loss, [d_rgb, -d_rgb] if rgb_target.requires_grad else [d_rgb]

    @staticmethod
    def _count(x: Tensor, reduction: str, denominator: float | Tensor | None) -> Any:
        count = ray_count(x.shape[:-1], reduction, denominator)
        return max(1, x.shape[-1]) * (1 if count is None else count)

    @staticmethod
    def _wanted(rgb: Tensor, rgb_target: Tensor) -> Tensor:
        if rgb_target.dtype not in (rgb.dtype, *HALVES) or rgb_target.device != rgb.device:
            rule, got = (f"{str(x.dtype)[6:]} on {x.device}" for x in (rgb, rgb_target))
            raise TypeError(f"field_losses: rgb_target must be {rule} like sigma, got {got}")
        return rgb_target.to(rgb.dtype)


_squared_error = _SquaredError()


def _some(x: Tensor, samples: slice | None) -> Tensor:
    return x if samples is None else x[samples]


class _Normals(NamedTuple):
    form: Form
    samples: slice | None
    """Of which samples they are, None of all."""
    n: Tensor | None
    d: Tensor | None
    n_pred: Tensor | None


def _objective(
    calls: Calls | None,
    form: Form,
    sigma: Tensor,
    t: tuple[Tensor, ...],
    rgb: Tensor | None,
    rgb_target: Tensor | None,
    features: Tensor | None,
    features_target: Tensor | None,
    *,
    normals: _Normals,
    s: tuple[Tensor, ...] | None,
    proposals: Sequence[tuple[Tensor, Tensor]],
    rendering: dict[str, Any],
    options: dict[str, Any],
) -> FieldLosses:
    """The terms, in an order that is of use: the features, which leave nothing else in the caches,
    come last on the way forth and first on the way back.

    Args:
        form: the dense or the packed form of an op.
        t, s: the intervals, as that form takes them.
    """
    calls = calls or Calls()
    check_reduction("field_losses", **options)

    def loss(names: str, op: Callable[..., Any], *args: Any, **named: Any) -> Any:
        return calls.loss(names.split(), op, *args, **named, **options)

    w = calls.op(*form("ray_weights", sigma, *t))[0]
    rendering["background"], *t_wide = _like(w, sigma, rendering["background"], *t)
    rendered = ops.Composite(*calls.op(*form("composite_rays", *t_wide, w), f=rgb, **rendering))
    none = w.new_zeros(rendered.accumulation.shape if options["reduction"] == "none" else ())
    rgb_loss = feature_loss = orientation = predicted = distortion = interlevel = none
    if rgb is not None and rgb_target is not None:
        rgb_loss = loss("rgb_loss", _squared_error, rendered.features, rgb_target)
    some, fixed = normals.form, w.detach()
    fixed_some, n, d, n_pred = _like(w, sigma, _some(fixed, normals.samples), *normals[2:])
    names = "orientation_loss predicted_normal_loss"
    if n is not None and n_pred is not None and n.requires_grad:
        predicted = loss(names, *some("normal_losses", fixed_some, n.detach()), n_pred=n_pred)[1]
        if d is not None:
            orientation = loss(names, *some("normal_losses", fixed_some, n), d=d)[0]
    elif n is not None and (d is not None or n_pred is not None):
        args = some("normal_losses", fixed_some, n)
        orientation, predicted = loss(names, *args, n_pred=n_pred, d=d)
    if s is not None:
        s = tuple(_like(w, sigma, *s))
        distortion = loss("distortion_loss", *form("distortion_loss", *s, w))
        for level in proposals:
            args = *s, fixed, *_like(w, sigma, *level)
            of_level = loss("interlevel_loss", *_dense("interlevel_loss", *args))
            interlevel = of_level if interlevel is none else interlevel + of_level
    if features is not None and features_target is not None:
        args = w, features, features_target
        feature_loss = loss("feature_loss", *form("feature_distillation_loss", *args))
    return FieldLosses(
        rgb_loss,
        feature_loss,
        orientation,
        predicted,
        distortion,
        interlevel,
        rgb=rendered.features,
        depth=rendered.depth,
        accumulation=rendered.accumulation,
        weights=w,
    )
