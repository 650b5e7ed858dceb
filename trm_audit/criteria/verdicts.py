"""Sequence scores in, a verdict for each sequence out: keep it or not, and if not, why (numpy, vectorised over rows).

The verdict belongs to the whole sequence, because the bounds depend on a maximum over its positions. Comparisons keep
equality. Never kept, whatever the criteria say: rows without a policy token, rows whose kl is infinite, NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trm_audit.criteria.conditions import FALSE, UNKNOWN
from trm_audit.criteria.expressions import Expression, parse
from trm_audit.criteria.grades import PROOF_OF_INFINITE_KL
from trm_audit.criteria.thresholds import Criteria, Rule, resolve
from trm_audit.errors import BadInput
from trm_audit.numerics.ragged import Bools, Floats, Ints
from trm_audit.rollout import GRADES, Grade

Scores = Mapping[str, NDArray[Any]]
"""Column of a score shard -> [rows], numbers with NaN for null; `grade` holds strings."""


@dataclass(frozen=True)
class Verdicts:
    """What the criteria say about some rows.

    Attributes:
        keep: [rows] True: train on it.
        reason: [rows] None where kept, otherwise a cause for each violated criterion, joined by `; ` in the order max,
            mean, sum, expression. `no_policy_tokens`, `seq_max_kl_infinite` and a kl that is NaN stand alone.

    Worked instance: keep [True, False], reason [None, "seq_max_k2_above_delta_max(value=0.1, position=7, delta=0.05)"].
    """

    keep: Bools
    reason: list[str | None]


_UNDECIDED = "undecided_"


def row_number(row: int) -> str:
    """Where a row stands, if nothing better is known."""
    return f"row {row}"


def decide(criteria: Criteria, scores: Scores, place: Callable[[int], str] = row_number) -> Verdicts:
    """Verdicts on the rows of one batch.

    Args:
        criteria: resolved or not. Those of a data set that comes in batches have to be resolved once, for all of it.
        scores: at least the columns of `criteria.needed_columns`. Without `seq_argmax_*` reasons give no position.
        place: names a row, for messages.

    Raises:
        UsageError: the criteria do not fit the grades of the rows (see `resolve`), or the expression not the columns.
        BadInput: a column is missing, a grade unknown, or a row undecided under `undecided="error"`.
    """
    grade = np.asarray(scores["grade"], dtype=object)
    has_tokens = _numbers(scores, "num_tokens") > 0
    resolved = resolve(criteria, set(grade[has_tokens].tolist()))
    findings = _Findings(scores, [None] * len(grade))
    findings.reject(np.flatnonzero(~has_tokens), "no_policy_tokens")
    open_rows = {name: findings.finite(name, np.flatnonzero(has_tokens & (grade == name))) for name in GRADES}
    for rule in resolved.rules:
        for name, rows in open_rows.items():
            if len(rows):
                findings.apply(rule, name, rows, masks_undecided=resolved.undecided != "keep")
    if resolved.keep is not None:
        findings.apply_expression(parse(resolved.keep), np.sort(np.concatenate(list(open_rows.values()))))
    if resolved.undecided == "error":
        _refuse_undecided(findings.reason, grade.tolist(), place)
    return Verdicts(np.array([reason is None for reason in findings.reason], dtype=bool), findings.reason)


def causes(reason: str) -> list[str]:
    """The causes that a reason joins, without their values: [`seq_max_k2_above_delta_max`, `keep_expression_false`]."""
    return [part.partition("(")[0] for part in reason.split("; ")]


@dataclass
class _Findings:
    """Where the reasons of one batch are collected.

    Attributes:
        scores: the columns.
        reason: [rows] what was found so far.
    """

    scores: Scores
    reason: list[str | None]

    def reject(self, rows: Ints, template: str, *columns: Floats) -> None:
        """Add a reason for each of some rows, `template % values`; columns are [len(rows)]."""
        values = zip(*(column.tolist() for column in columns), strict=True)
        texts = [template % each for each in values] if columns else [template] * len(rows)
        for row, text in zip(rows.tolist(), texts, strict=True):
            earlier = self.reason[row]
            self.reason[row] = text if earlier is None else f"{earlier}; {text}"

    def reject_nan(self, rows: Ints, column: str) -> None:
        missing = np.isnan(_numbers(self.scores, column)[rows])
        self.reject(rows[missing], f"not_a_number(column={column})")

    def finite(self, grade: Grade, rows: Ints) -> Ints:
        """Reject what the grade proves to have infinite kl; the other rows."""
        if grade not in PROOF_OF_INFINITE_KL or not len(rows):
            return rows
        divergence = PROOF_OF_INFINITE_KL[grade]
        column = f"seq_max_{divergence}"
        values = _numbers(self.scores, column)[rows]
        self.reject_nan(rows, column)
        infinite = rows[values == np.inf]
        label, position = self._position(divergence, infinite)
        self.reject(infinite, f"seq_max_kl_infinite({label})" if label else "seq_max_kl_infinite", *position)
        return rows[values < np.inf]

    def apply(self, rule: Rule, grade: Grade, rows: Ints, *, masks_undecided: bool) -> None:
        """Reject the rows of one grade that violate a threshold."""
        first, *second = rule.compared(grade)
        self._reject_above(rule, first, rows)
        if rule.veto:
            self._reject_above(rule, second[0], rows, prefix="veto_")
        elif second:
            self.reject_nan(rows, rule.column(second[0]))
            if masks_undecided:
                self._reject_undecided(rule, first, second[0], rows)

    def _reject_above(self, rule: Rule, divergence: str, rows: Ints, prefix: str = "") -> None:
        column = rule.column(divergence)
        self.reject_nan(rows, column)
        values = _numbers(self.scores, column)[rows]
        above = values > rule.delta
        label, position = self._position(divergence, rows[above]) if rule.statistic == "max" else ("", ())
        fields = ", ".join(part for part in ("value=%.6g", label, f"delta={rule.delta:.6g}") if part)
        self.reject(rows[above], f"{prefix}{column}_above_{rule.delta_name}({fields})", values[above], *position)

    def _reject_undecided(self, rule: Rule, lower: str, upper: str, rows: Ints) -> None:
        low, high = (_numbers(self.scores, rule.column(bound))[rows] for bound in (lower, upper))
        between = (low <= rule.delta) & (high > rule.delta)
        cause = f"{_UNDECIDED}{rule.column(str(rule.divergence))}"
        fields = f"lower=%.6g, upper=%.6g, delta={rule.delta:.6g}"
        self.reject(rows[between], f"{cause}({fields})", low[between], high[between])

    def apply_expression(self, expression: Expression, rows: Ints) -> None:
        """Reject the rows for which an expression is false or unknown."""
        truth = np.broadcast_to(expression.truth(self.scores), len(self.reason))[rows]
        columns = {name: _numbers(self.scores, name)[rows] for name in expression.columns}
        fields = ", ".join(f"{name}=%.6g" for name in columns)
        false = truth == FALSE
        values = [column[false] for column in columns.values()]
        self.reject(rows[false], f"keep_expression_false({fields})" if fields else "keep_expression_false", *values)
        unknown = truth == UNKNOWN
        for name, column in columns.items():
            self.reject(rows[unknown & np.isnan(column)], f"not_a_number(column={name})")
            unknown &= ~np.isnan(column)
        self.reject(rows[unknown], "not_a_number")

    def _position(self, divergence: str, rows: Ints) -> tuple[str, tuple[Floats, ...]]:
        """Field and values of where the maximum stands; empty where the scores do not say."""
        column = f"seq_argmax_{divergence}"
        if column not in self.scores:
            return "", ()
        return "position=%.0f", (_numbers(self.scores, column)[rows],)


def _numbers(scores: Scores, column: str) -> Floats:
    if column not in scores:
        raise BadInput(f"there is no column {column}", next_step="Score the rollouts again (schemas/score.md).")
    return np.asarray(scores[column], dtype=np.float64)


def _refuse_undecided(reasons: list[str | None], grades: list[Grade], place: Callable[[int], str]) -> None:
    """Raise BadInput at the first row that would be kept but for a threshold between its bounds."""
    for row, reason in enumerate(reasons):
        if reason is not None and all(cause.startswith(_UNDECIDED) for cause in causes(reason)):
            raise BadInput(
                f"undecided: {reason.removeprefix(_UNDECIDED)}",
                place=place(row),
                next_step=f"Use --undecided mask or keep, or {_estimate_for(grades[row], reason)}.",
            )


def _estimate_for(grade: Grade, reason: str) -> str:
    """What to ask for, so that an estimate decides on a row where bounds do not."""
    if grade != "sketch":
        return "name an estimate with --max-of k2 --avg-of k3"
    if all(cause.endswith("_kl") for cause in causes(reason)):
        return "let the estimate of kl decide with --on-estimate"
    return "go by the estimate of kl, since tv has none: --max-of kl --on-estimate"
