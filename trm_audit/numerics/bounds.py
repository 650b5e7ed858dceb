"""How wrong can the surrogate be? Seven bounds on |J(theta) - J(roll) - L'|, as published and with sharp constants.

Let R in [0, 1], T the horizon, delta = max KL(pi_roll || pi_theta) and eps = max TV over contexts, D_seq = sum_t
E[KL(c_t)], D_TV_seq the total variation between the laws of whole responses, Dbar_t = E[TV(c_t)], all expectations
under pi_roll. The published bounds (Trust Region Masking, arXiv 2512.23075) rest on |g_t(c)| <= 2 TV(c), where g_t(c)
= sum_y (pi_theta - pi_roll)(y|c) Q(c, y). For Q in [0, 1] it is |g_t(c)| <= TV(c), so half of each holds too: that is
`sharp`.

Maxima over visited contexts are lower bounds of delta and eps, so with numbers measured on data every bound is a
plug-in estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from trm_audit.numerics.ragged import Floats

BOUNDS = (
    "classical_bound",
    "coupling_bound",
    "pinsker_marginal_bound",
    "pinsker_marginal_tv_bound",
    "mixed_bound",
    "mixed_tv_bound",
    "adaptive_bound",
)
"""Every bound, in the order of the theory."""


@dataclass(frozen=True)
class Bound:
    """One bound in both constants, in units of the reward.

    Attributes:
        published: as in the paper.
        sharp: half of it.
    """

    published: float
    sharp: float


@dataclass(frozen=True)
class ErrorBounds:
    """All seven bounds and what they were computed from, after caps and defaults.

    Attributes:
        horizon: T, the longest response in policy tokens.
        kl_max: delta (nats), inf where unknown.
        kl_seq: D_seq (nats).
        tv_max: eps, at most 1.
        tv_seq: D_TV_seq, at most 1.
        reward_range: R_max - R_min; every bound is multiplied by it.
        bounds: name from `BOUNDS` -> both constants.
    """

    horizon: int
    kl_max: float
    kl_seq: float
    tv_max: float
    tv_seq: float
    reward_range: float
    bounds: dict[str, Bound]

    @property
    def minimum(self) -> str:
        """Name of the smallest bound (the first of equals)."""
        return min(self.bounds, key=lambda name: self.bounds[name].published)

    @property
    def vacuous(self) -> bool:
        """True where even the smallest sharp bound reaches the reward's range."""
        return self.bounds[self.minimum].sharp >= self.reward_range

    @property
    def sentence(self) -> str:
        """What the smallest bound is worth, in plain words."""
        best, reach = self.bounds[self.minimum], self.reward_range
        named = f"the smallest bound, {self.minimum} = {best.published:.4g} (sharp {best.sharp:.4g}),"
        if self.vacuous:
            return (
                f"Vacuous: even {named} reaches the reward's range of {reach:.4g}: nothing follows about improvement."
            )
        if best.published >= reach:
            return (
                f"Informative only in its sharp form: {named} reaches the reward's range of {reach:.4g} as published."
            )
        return f"Informative: {named} is below the reward's range of {reach:.4g}."


def error_bounds(
    horizon: int,
    *,
    kl_max: float | None = None,
    kl_seq: float | None = None,
    tv_max: float | None = None,
    tv_seq: float | None = None,
    tv_by_position: Floats | None = None,
    reward_range: float = 1.0,
) -> ErrorBounds:
    """All seven bounds on |J(theta) - J(roll) - L'|.

    Args:
        horizon: T >= 1.
        kl_max: delta (nats), may be inf; unknown (inf) if None, then `tv_max` must be given.
        kl_seq: D_seq (nats); T * delta if None.
        tv_max: eps; Pinsker's sqrt(delta/2) is used where that is smaller, or if None.
        tv_seq: D_TV_seq; 1, sqrt(D_seq/2) and the sum of Dbar_t are used where they are smaller, or if None.
        tv_by_position: [at most T] Dbar_t, 0 after its end; Dbar_t = eps if None.
        reward_range: R_max - R_min.

    Raises:
        ValueError: an argument is out of its range, or neither `kl_max` nor `tv_max` is given.

    Source: arXiv 2512.23075; sums over t are vectorised, O(T) time and memory.
    """
    if kl_max is None and tv_max is None:
        raise ValueError("one of kl_max and tv_max is needed")
    _check(
        horizon, {"kl_max": kl_max, "kl_seq": kl_seq, "tv_max": tv_max, "tv_seq": tv_seq, "reward_range": reward_range}
    )
    delta = math.inf if kl_max is None else float(kl_max)
    eps = min(1.0, _pinsker(delta), math.inf if tv_max is None else float(tv_max))
    total = horizon * delta if kl_seq is None else float(kl_seq)
    drift = _positions(horizon, eps, tv_by_position)
    total_tv = min(1.0, _pinsker(total), float(drift.sum()), math.inf if tv_seq is None else float(tv_seq))
    published = _published(horizon, delta, eps, total, total_tv, drift)
    pairs = {name: Bound(reward_range * value, reward_range * value / 2) for name, value in published.items()}
    return ErrorBounds(horizon, delta, total, eps, total_tv, float(reward_range), pairs)


def pinsker_marginal_closed_form(horizon: int, kl_max: float) -> float:
    """(4/3) T^1.5 delta: the uncapped `pinsker_marginal_bound`, never below it, for R in [0, 1]."""
    return 4 / 3 * horizon * math.sqrt(horizon) * kl_max


def _published(T: int, delta: float, eps: float, total: float, total_tv: float, drift: Floats) -> dict[str, float]:
    steps = np.arange(T, dtype=np.float64)  # [T] t - 1 tokens before position t; reversed: the T - t after it
    by_kl = _capped(np.sqrt(_times(steps, delta / 2)))
    by_tv = _capped(_times(steps, eps))
    future = np.minimum(by_tv, by_kl)[::-1]
    root = min(1.0, _pinsker(delta))
    return {
        "classical_bound": 2.0 * T * (T - 1) * eps**2,
        "coupling_bound": 4 * eps * float(by_tv.sum()),
        "pinsker_marginal_bound": 4 * root * float(by_kl.sum()),
        "pinsker_marginal_tv_bound": 4 * eps * float(by_kl.sum()),
        "mixed_bound": 4 * T * root * min(1.0, _pinsker(total)),
        "mixed_tv_bound": 4 * T * eps * total_tv,
        "adaptive_bound": 4 * float(np.dot(drift, future)),
    }


def _pinsker(kl: float) -> float:
    """TV <= sqrt(KL/2)."""
    return math.sqrt(kl / 2)


def _times(steps: Floats, rate: float) -> Floats:
    """steps * rate with 0 * inf = 0: nothing has happened before the first step, however large the rate."""
    return np.where(steps > 0, np.maximum(steps, 1.0) * rate, 0.0)


def _capped(values: Floats) -> Floats:
    return np.minimum(values, 1.0)


def _positions(horizon: int, eps: float, tv_by_position: Floats | None) -> Floats:
    """[T] Dbar_t: given, filled up with 0, and at most 1; eps everywhere if not given."""
    if tv_by_position is None:
        return np.full(horizon, eps)
    given = np.asarray(tv_by_position, dtype=np.float64)
    if given.ndim != 1 or len(given) > horizon or not (given >= 0).all():
        raise ValueError("tv_by_position must be one list of at most `horizon` numbers that are at least 0")
    return _capped(np.pad(given, (0, horizon - len(given))))


def _check(horizon: int, values: dict[str, float | None]) -> None:
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, not {horizon}")
    for name, value in values.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be at least 0, not {value}")
    if math.isinf(values["reward_range"] or 0.0):
        raise ValueError("reward_range must be finite")
