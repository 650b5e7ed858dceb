"""Which sequences to train on: thresholds on sequence scores, and what they mean at each grade of evidence.

A threshold compares `seq_max_D`, `seq_mean_D` or `seq_sum_D` with a delta, and means nothing without the name of its D:
0.05 is strict for abs_log_ratio and lax for kl. D is named (`--max-of`), or it is the default of the grade of the data
(`grades`): kl of exact rows, kl_estimate of sketches, k2 and k3 of the others.

Where kl or tv is named, the bounds of a sketch or an interval decide: upper bound <= delta keeps, lower bound > delta
rejects, and between the two the row is undecided. An interval's bounds are certain, a sketch's hold at the confidence
of the run. With `on_estimate` rows of grade sketch go by kl_estimate where kl is named, so that one threshold on kl
decides on exact and sketched rows together. What the criteria say about rows is in `verdicts`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from trm_audit.criteria.expressions import parse
from trm_audit.criteria.grades import (
    ANSWERS,
    BOUNDED_DIVERGENCES,
    BOUNDED_GRADES,
    CRITERION_DIVERGENCES,
    DEFAULT_DIVERGENCES,
    PROOF_OF_INFINITE_KL,
    Statistic,
    answered_by_all,
    known_grades,
)
from trm_audit.errors import BadInput, UsageError
from trm_audit.rollout import Grade

Undecided = Literal["mask", "keep", "error"]

_FIELDS: tuple[tuple[Statistic, str, str], ...] = (
    ("max", "delta_max", "max_of"),
    ("mean", "delta_avg", "avg_of"),
    ("sum", "delta_total", "total_of"),
)
_GO_BY_ESTIMATE = "With kl and --on-estimate, sketched rows go by their estimate of it"


@dataclass(frozen=True)
class Rule:
    """One threshold of some criteria.

    Attributes:
        statistic: over the policy tokens of a sequence.
        divergence: what is compared, or None while the grade that decides it is not known.
        delta: largest value that is kept.
        delta_name: what the delta is called: `delta_max`, `delta_avg` or `delta_total`.
        of_name: what the divergence's name is called: `max_of`, `avg_of` or `total_of`.
        veto: a lower bound of kl above the delta rejects too.
        on_estimate: where kl is named, rows of grade sketch go by its estimate.
    """

    statistic: Statistic
    divergence: str | None
    delta: float
    delta_name: str
    of_name: str
    veto: bool
    on_estimate: bool

    def column(self, divergence: str) -> str:
        """The score column of this statistic, as `seq_max_k2`."""
        return f"seq_{self.statistic}_{divergence}"

    def compared(self, grade: Grade) -> tuple[str, ...]:
        """The divergences that decide at a grade: one, one and its veto, or a lower and an upper bound."""
        if self.divergence is None:
            return ()
        if self.is_bounded(grade):
            return f"{self.divergence}_lower", f"{self.divergence}_upper"
        if self._is_estimated(grade):
            return ("kl_estimate",)
        return (self.divergence, "kl_lower") if self.veto else (self.divergence,)

    def is_bounded(self, grade: Grade) -> bool:
        """Whether a lower and an upper bound decide, so that a row can be undecided."""
        return grade in BOUNDED_GRADES and self.divergence in BOUNDED_DIVERGENCES and not self._is_estimated(grade)

    def _is_estimated(self, grade: Grade) -> bool:
        return self.on_estimate and grade == "sketch" and self.divergence == "kl"


@dataclass(frozen=True)
class Criteria:
    """What a sequence has to satisfy to be trained on. All that is given has to hold.

    Attributes:
        delta_max, max_of: threshold on `seq_max_<max_of>` (nats; tv has no unit), and the divergence it is on.
        delta_avg, avg_of: the same on `seq_mean_*`.
        delta_total, total_of: the same on `seq_sum_*`.
        keep: an expression that has to be true, see `expressions`.
        undecided: what happens to a row whose bounds enclose a threshold; `mask` rejects it.
        on_estimate: where kl is named, rows of grade sketch go by kl_estimate instead of its bounds.
        default_grade: set by `resolve`: the grade whose default divergences were filled in; rows of others are refused.
        defaulted: set by `resolve`: the statistics whose divergence is such a default.

    Divergences may be spelled as flags are (`abs-log-ratio`). Raises UsageError for criteria that mean nothing.

    Worked instance: Criteria(delta_max=0.05, delta_avg=0.002) keeps an exact row where seq_max_kl <= 0.05 and
    seq_mean_kl <= 0.002.
    """

    delta_max: float | None = None
    max_of: str | None = None
    delta_avg: float | None = None
    avg_of: str | None = None
    delta_total: float | None = None
    total_of: str | None = None
    keep: str | None = None
    undecided: Undecided = "mask"
    on_estimate: bool = False
    default_grade: Grade | None = None
    defaulted: tuple[Statistic, ...] = ()

    def __post_init__(self) -> None:
        for _, delta_name, of_name in _FIELDS:
            _check_delta(delta_name, getattr(self, delta_name))
            divergence = getattr(self, of_name)
            if divergence is not None:
                object.__setattr__(self, of_name, divergence.replace("-", "_"))
                _check_divergence(of_name, getattr(self, of_name), delta_name, getattr(self, delta_name))
        if self.undecided not in get_args(Undecided):
            raise UsageError(f"{self.undecided!r} is not mask, keep or error", place="--undecided")
        if self.keep is not None:
            parse(self.keep)
        elif not self.rules:
            raise UsageError(
                "no criterion was given, and thresholds have no default",
                next_step="Give at least one of --delta-max, --delta-avg, --delta-total and --keep.",
            )
        if self.on_estimate:
            _check_estimable(self)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The thresholds that were given, in the order max, mean, sum."""
        vetoed = self.defaulted if self.default_grade == "interval" else ()
        return tuple(
            Rule(statistic, getattr(self, of_name), delta, delta_name, of_name, statistic in vetoed, self.on_estimate)
            for statistic, delta_name, of_name in _FIELDS
            if (delta := getattr(self, delta_name)) is not None
        )

    def to_json(self) -> str:
        """One JSON object with a key for each attribute, as `from_json` reads it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Criteria:
        """Criteria as `to_json` wrote them. Raises BadInput if the text is something else."""
        try:
            values = json.loads(text)
            return cls(**{**values, "defaulted": tuple(values["defaulted"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadInput(
                f"these are no criteria: {error}", next_step="Run filter again to write them anew."
            ) from error


def resolve(criteria: Criteria, grades: Collection[str]) -> Criteria:
    """The same criteria with every divergence named.

    Args:
        criteria: resolved or not; resolving twice changes nothing.
        grades: of the rows that have policy tokens. With none at all the criteria stay as they are.

    Raises:
        UsageError: the grades differ and a threshold does not name its divergence, or a named one cannot be had at one.
        BadInput: a grade is unknown.
    """
    present = known_grades(grades)
    _check_answerable(criteria, present)
    unnamed = [rule for rule in criteria.rules if rule.divergence is None or rule.statistic in criteria.defaulted]
    if not unnamed or not present:
        return criteria
    meant = known_grades({*present, criteria.default_grade or present[0]})
    if len(meant) > 1:
        named = f"Name it with {' and '.join(_flag(rule.of_name) for rule in unnamed)}; {answered_by_all(meant)}."
        estimable = "sketch" in meant and all("kl" in ANSWERS[grade] for grade in meant)
        raise UsageError(
            f"the rows are of several grades ({', '.join(meant)}), which have no default divergence in common",
            place=" and ".join(_flag(rule.delta_name) for rule in unnamed),
            next_step=f"{named} {_GO_BY_ESTIMATE}." if estimable else named,
        )
    filled: dict[str, Any] = {rule.of_name: DEFAULT_DIVERGENCES[meant[0]][rule.statistic] for rule in unnamed}
    return replace(criteria, default_grade=meant[0], defaulted=tuple(rule.statistic for rule in unnamed), **filled)


def describe(criteria: Criteria, grades: Collection[str], confidence: float | None = None) -> list[str]:
    """A line per criterion that says what decides at which grade, as `max: k2 <= 0.05 (sampled)`.

    Args:
        criteria: resolved or not.
        grades: of the rows that have policy tokens.
        confidence: at which the bounds of sketched rows hold, at all tokens of a sequence; None if not known here.
    """
    at = "the confidence of the run" if confidence is None else f"{confidence * 100:.6g} % confidence"
    lines: dict[str, list[str]] = {}
    for rule in resolve(criteria, grades).rules:
        for grade in known_grades(grades):
            sentence = _sentence(rule, grade, criteria.undecided)
            if grade == "sketch" and rule.is_bounded(grade):
                sentence += f"; the bounds hold at {at}"
            lines.setdefault(sentence, []).append(grade)
    said = [f"{sentence} ({', '.join(names)})" for sentence, names in lines.items()]
    return said if criteria.keep is None else [*said, f"keep: {parse(criteria.keep)}"]


def needed_columns(criteria: Criteria, grades: Collection[str], available: Collection[str] | None = None) -> list[str]:
    """The score columns that a verdict looks at.

    Args:
        criteria: resolved or not.
        grades: of the rows that have policy tokens.
        available: the columns of the shard. If given, they are checked, and positions that it lacks are left out.

    Raises:
        UsageError: the expression names a column that is not available; the message names those spelled alike.
        BadInput: another needed column is not available.
    """
    present = known_grades(grades)
    names = ["grade", "num_tokens"]
    positions = [PROOF_OF_INFINITE_KL[grade] for grade in present if grade in PROOF_OF_INFINITE_KL]
    names += [f"seq_max_{divergence}" for divergence in positions]
    for rule in resolve(criteria, grades).rules:
        compared = [divergence for grade in present for divergence in rule.compared(grade)]
        names += [rule.column(divergence) for divergence in compared]
        positions += compared if rule.statistic == "max" else []
    expression = parse(criteria.keep) if criteria.keep is not None else None
    if available is not None:
        for name in names:
            if name not in available:
                raise BadInput(f"there is no column {name}", next_step="Score the rollouts again (schemas/score.md).")
        if expression is not None:
            expression.check_names(available)
    argmax = [f"seq_argmax_{divergence}" for divergence in positions]
    names += [name for name in argmax if available is None or name in available]
    return list(dict.fromkeys([*names, *(expression.columns if expression else ())]))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_delta(name: str, delta: float | None) -> None:
    if delta is not None and not (math.isfinite(delta) and delta >= 0):
        raise UsageError(f"{delta} is no threshold: it has to be finite and at least 0", place=_flag(name))


def _check_divergence(name: str, divergence: str, delta_name: str, delta: float | None) -> None:
    if delta is None:
        raise UsageError(f"names a divergence, but there is no {_flag(delta_name)}", place=_flag(name))
    if divergence not in CRITERION_DIVERGENCES:
        known = ", ".join(name.replace("_", "-") for name in CRITERION_DIVERGENCES)
        raise UsageError(
            f"{divergence} is not a divergence that a threshold can name",
            place=_flag(name),
            next_step=f"Name one of {known}; for anything else write an expression with --keep.",
        )


def _check_estimable(criteria: Criteria) -> None:
    """Raise UsageError where `on_estimate` cannot decide anything, whatever the rows."""
    open_to_it = [rule.divergence in (None, "kl", "kl_estimate") for rule in criteria.rules]
    if not any(open_to_it) and not criteria.defaulted:
        raise UsageError(
            "no threshold is on kl, the one divergence that sketched rows can be judged on by an estimate",
            place="--on-estimate",
            next_step="Name kl with --max-of, --avg-of or --total-of, or leave --on-estimate out.",
        )


def _check_answerable(criteria: Criteria, grades: Iterable[Grade]) -> None:
    named = [rule for rule in criteria.rules if rule.statistic not in criteria.defaulted]
    for rule in named:
        for grade in grades:
            if rule.divergence is not None and rule.divergence not in ANSWERS[grade]:
                raise UsageError(
                    f"rows of grade {grade} do not tell {rule.divergence}",
                    place=_flag(rule.of_name),
                    next_step=_instead(rule.divergence, grade),
                )


def _instead(divergence: str, grade: Grade) -> str:
    """What to do about a divergence that a grade does not tell."""
    if divergence == "kl_estimate" and grade == "exact":
        return f"Name kl, which exact rows tell. {_GO_BY_ESTIMATE}."
    return f"Name another divergence ({answered_by_all([grade])}), or record rollouts of a better grade."


def _sentence(rule: Rule, grade: Grade, undecided: Undecided) -> str:
    first, *second = rule.compared(grade)
    kept = f"{rule.statistic}: {first} <= {rule.delta:.6g}"
    if not second:
        return kept
    if rule.veto:
        return f"{kept}, vetoed by {second[0]} > {rule.delta:.6g}"
    kept = f"{rule.statistic}: {second[0]} <= {rule.delta:.6g} keeps"
    return f"{kept}, {first} > {rule.delta:.6g} rejects, between the two --undecided {undecided}"
