"""What each grade of evidence can tell a threshold: which divergences it knows, and which it is asked for by default.

    exact      kl, kl_reverse, tv, and what sampled rows know    kl everywhere
    sketch     kl and tv by bounds, kl_estimate, likewise        kl_estimate everywhere
    interval   kl and tv by bounds, likewise                     as sampled, and kl_lower above the delta vetoes
    sampled    abs_log_ratio, k2, k3                             k2 for the maximum, k3 for mean and sum

kl_estimate is the default of a sketch because it estimates the exact kl over the whole vocabulary, to about 10 % in
the largest of a sequence. k2 knows the sampled token alone: it is off by far more, and ranks sequences differently.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from trm_audit.errors import BadInput
from trm_audit.rollout import BOUNDED_GRADES as BOUNDED_GRADES
from trm_audit.rollout import GRADES, Grade

Statistic = Literal["max", "mean", "sum"]

CRITERION_DIVERGENCES = ("kl", "kl_reverse", "tv", "kl_estimate", "abs_log_ratio", "k2", "k3")
"""Every D that a threshold can name. The signed ones (log_ratio, k1) are for expressions."""

BOUNDED_DIVERGENCES = ("kl", "tv")
"""Those with a lower and an upper bound at the grades `sketch` and `interval`."""

_SAMPLED = ("abs_log_ratio", "k2", "k3")
_SAMPLED_DEFAULTS: dict[Statistic, str] = {"max": "k2", "mean": "k3", "sum": "k3"}
ANSWERS: dict[Grade, tuple[str, ...]] = {
    "exact": ("kl", "kl_reverse", "tv", *_SAMPLED),
    "sketch": (*BOUNDED_DIVERGENCES, "kl_estimate", *_SAMPLED),
    "interval": (*BOUNDED_DIVERGENCES, *_SAMPLED),
    "sampled": _SAMPLED,
}
"""The D that a threshold can name at each grade."""
DEFAULT_DIVERGENCES: dict[Grade, dict[Statistic, str]] = {
    "exact": {"max": "kl", "mean": "kl", "sum": "kl"},
    "sketch": {"max": "kl_estimate", "mean": "kl_estimate", "sum": "kl_estimate"},
    "interval": _SAMPLED_DEFAULTS,
    "sampled": _SAMPLED_DEFAULTS,
}
PROOF_OF_INFINITE_KL: dict[Grade, str] = {"exact": "kl", "sketch": "kl_lower", "interval": "kl_lower"}
"""The D whose maximum, where it is infinite, proves that the kl is. A sketch's kl_lower is so only where the trainer
excludes a token of the list, or all others: the projection has no say in it, so that it is certain there too."""


def known_grades(grades: Collection[str]) -> tuple[Grade, ...]:
    """Each of some grades once, the best first. Raises BadInput where one is none."""
    if strange := [grade for grade in grades if grade not in GRADES]:
        raise BadInput(f"unknown grade {strange[0]!r}", next_step=f"Grades are {', '.join(GRADES)} (schemas/score.md).")
    return tuple(grade for grade in GRADES if grade in grades)


def answered_by_all(grades: Collection[Grade]) -> str:
    """`kl, abs-log-ratio, k2 and k3 can be had here`, spelled as flags are."""
    common = [name for name in CRITERION_DIVERGENCES if all(name in ANSWERS[grade] for grade in grades)]
    spelled = [name.replace("_", "-") for name in common]
    return f"{', '.join(spelled[:-1])} and {spelled[-1]} can be had here"
