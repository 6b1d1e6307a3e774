# SPDX-License-Identifier: Apache-2.0
"""Teachers: parameters that no optimizer holds, and that follow trained ones of the same shape (EMA, BYOL, MoCo).

Where and how the user's code moves them does not matter. What matters is what comes of it: the teacher after a step is
a multiple of what it was, plus a multiple of its partner, number by number. Both factors are found in the recorded
tensors, and hold for all their numbers to rounding, or the teacher is not followed.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_sgdclean.base.errors import UnsupportedTrainingError

_MOST = 2  # times the bytes of what is trained: other frozen parameters are no teachers


def teachers_of(module: nn.Module, trained: Collection[nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters that may be teachers, by name: not trained, each like a trained one in name, shape and dtype.

    Args:
        module: The module.
        trained: The parameters that the optimizer moves.
    """
    held = {id(param) for param in trained}
    kinds = {_kind(name, param) for name, param in module.named_parameters() if id(param) in held}
    others = {name: param for name, param in module.named_parameters() if id(param) not in held}
    found = {name: param for name, param in others.items() if _kind(name, param) in kinds}
    fits = sum(param.nbytes for param in found.values()) <= _MOST * sum(param.nbytes for param in trained)
    return found if fits else {}


def _kind(name: str, tensor: Tensor) -> tuple[str, torch.Size, torch.dtype]:
    return name.rpartition(".")[2], tensor.shape, tensor.dtype


@dataclass(frozen=True)
class Following:
    """What a teacher has come to be: ``own`` times what it was, plus ``share`` times a trained parameter.

    Attributes:
        own: Factor of what it was.
        share: Factor of its partner.
        partner: The partner's name; empty where there is none, since ``share`` is zero.
        is_new: Whether the partner is meant as it is after the step.
    """

    own: float = 1.0
    share: float = 0.0
    partner: str = ""
    is_new: bool = False

    @property
    def moves(self) -> bool:
        """Whether the teacher has moved."""
        return (self.own, self.share) != (1.0, 0.0)


def followings(
    now: Mapping[str, Tensor],
    was: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    later: Mapping[str, Tensor] | None = None,
) -> dict[str, Following]:
    """How teachers came to be what they are.

    Args:
        now: What they are, by name.
        was: What they were.
        params: The trained parameters.
        later: The same after a step, if they may have been taken from there, too.

    Raises:
        UnsupportedTrainingError: If one is no such sum.
    """
    found = {name: Following() for name, tensor in now.items() if torch.equal(was[name].to(tensor), tensor)}
    moved = {name: tensor for name, tensor in now.items() if name not in found}
    sides = [_all_follow(moved, was, params, is_new=False)]
    if later is not None and moved:
        sides.append(_all_follow(moved, was, later, is_new=True))
    known = [side for side in sides if isinstance(side, list)]
    if not known:
        raise UnsupportedTrainingError(
            f"The parameter {sides[0]!r} moved, although the optimizer does not hold it, and what it came to be is no "
            "sum of multiples of what it was and of a trained parameter of its shape. So what samples do through it is "
            "not followed; an average of the weights, as of a momentum teacher, would be. Keep it fixed, or give it to "
            "the optimizer."
        )
    chosen = _with_one_share(min(known, key=lambda side: sum(fit.off for fit in side)))
    return found | {fit.name: fit.how for fit in chosen} | _resting(found, chosen, now, params)


def _resting(
    found: Mapping[str, Following], moved: "list[_Fit]", now: Mapping[str, Tensor], params: Mapping[str, Tensor]
) -> dict[str, Following]:
    """Those that do not move since their partners do not, where the others have one share: it is theirs, too."""
    hows = {replace(fit.how, partner="") for fit in moved}
    if len(hows) != 1:
        return {}
    pairs = ((name, partner_at_rest(name, now[name], params)) for name in found)
    return {name: replace(next(iter(hows)), partner=partner) for name, partner in pairs if partner}


def partner_at_rest(name: str, teacher: Tensor, params: Mapping[str, Tensor]) -> str:
    """The trained parameter whose numbers a teacher holds to rounding, as both do that never move; empty if none."""
    kind = _kind(name, teacher)
    names = [other for other, param in params.items() if _kind(other, param) == kind]
    best = max(names, key=lambda other: _shared(name, other), default="")
    tolerance = _ROUNDINGS * torch.finfo(teacher.dtype).eps
    rests = best and torch.allclose(params[best].to(teacher), teacher, rtol=tolerance, atol=0.0)
    return best if rests else ""


@dataclass
class _Fit:
    name: str
    how: Following
    off: float
    moved: Tensor
    gap: Tensor
    rounding: Tensor


def _all_follow(
    now: Mapping[str, Tensor], was: Mapping[str, Tensor], params: Mapping[str, Tensor], is_new: bool
) -> "list[_Fit] | str":
    """A fit for each teacher, or the name of the first that has none."""
    fits = []
    for name, tensor in now.items():
        kind, begin = _kind(name, tensor), was[name].to(tensor)
        names = [other for other, param in params.items() if _kind(other, param) == kind]
        likest = max((_shared(name, other) for other in names), default=0)
        some = [
            _fit(name, tensor, begin, other, params[other], is_new) for other in names if _shared(name, other) == likest
        ]
        found = [fit for fit in some if fit is not None]
        if not found:
            return name
        fits.append(min(found, key=lambda fit: fit.off))
    return fits


def _with_one_share(fits: list[_Fit]) -> list[_Fit]:
    """Means whose share is the same to rounding have it from all their numbers together, which is less noisy."""
    means = [fit for fit in fits if abs(fit.how.own + fit.how.share - 1.0) <= 1e-12]
    size = sum(float(fit.gap @ fit.gap) for fit in means)
    share = sum(float(fit.moved @ fit.gap) for fit in means) / size if size else 0.0
    if means and all(bool(((fit.moved - share * fit.gap).abs() <= fit.rounding).all()) for fit in means):
        for fit in means:
            fit.how = replace(fit.how, own=1.0 - share, share=share)
    return fits


def _shared(one: str, other: str) -> int:
    """How many parts two names share at their ends."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(one.count("."), other.count(".")) + 1)


_ROUNDINGS = 16


def _fit(name: str, now: Tensor, was: Tensor, partner: str, param: Tensor, is_new: bool) -> _Fit | None:
    """Factors that explain all numbers to rounding: those of a mean first, then any two."""
    eps = torch.finfo(now.dtype).eps
    now, was, param = (tensor.detach().to(now.device, torch.float64).reshape(-1) for tensor in (now, was, param))
    gap, moved = param - was, now - was
    rounding = _ROUNDINGS * eps * (was.abs() + param.abs() + now.abs())
    size = float(gap @ gap)
    share = float(moved @ gap) / size if size else 0.0
    along = float(was @ gap) / size if size else 0.0
    across = was - along * gap  # the part of what it was that the gap does not have
    length = float(across @ across)
    stretch = float(moved @ across) / length if length else 0.0
    for own, of_gap in ((0.0, share), (stretch, share - stretch * along)):
        off = (moved - own * was - of_gap * gap).abs()
        if bool((off <= rounding).all()):
            how = Following(1.0 + own - of_gap, of_gap, partner, is_new)
            return _Fit(name, how, float(off.norm()), moved, gap, rounding)
    return None


def pull_back_following(how: Mapping[str, Following], adjoint: dict[str, Tensor]) -> list[tuple[Following, Tensor]]:
    """Transpose how a step moves teachers: takes ``nu`` (in place) to before it, and gives what it adds to partners.

    Args:
        how: How each teacher moved.
        adjoint: ``nu`` after the step, by buffer and teacher.
    """
    added = [(one, one.share * adjoint[name]) for name, one in how.items() if name in adjoint and one.share]
    adjoint |= {name: one.own * adjoint[name] for name, one in how.items() if name in adjoint}
    return added
