"""The numbers that scores must not exceed: what thresholds amount to, and --keep where it compares a column plainly.

--delta-max 0.05 --keep "seq_mean_k3 < 2e-3 and not num_tokens > 900"
[("seq_max_kl", 0.05), ("seq_mean_k3", 0.002), ("num_tokens", 900.0)]       (exact rows)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trm_audit.criteria.conditions import And, Column, Comparison, Condition, Not, Number, Operand, Or
from trm_audit.criteria.expressions import parse
from trm_audit.criteria.thresholds import Criteria, Rule, resolve
from trm_audit.rollout import GRADES, Grade

Limit = tuple[str, float]
"""A column and the largest value that it may have."""

_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def limits(criteria: Criteria, grades: Collection[str]) -> list[Limit]:
    """Every column that has to stay below a number, with the number; each pair once, those of thresholds first.

    Args:
        criteria: resolved or not.
        grades: of the rows that have policy tokens; without any, thresholds decide nothing and give no limit.

    Raises:
        UsageError, BadInput: see `thresholds.resolve`.
    """
    rules = resolve(criteria, grades).rules
    present = [grade for grade in GRADES if grade in grades]
    keeps = criteria.undecided == "keep"
    found = [
        (rule.column(d), rule.delta) for rule in rules for grade in present for d in _rejecting(rule, grade, keeps)
    ]
    if criteria.keep is not None:
        found += upper_limits(parse(criteria.keep).condition)
    return list(dict.fromkeys(found))


def _rejecting(rule: Rule, grade: Grade, keeps_undecided: bool) -> tuple[str, ...]:
    """The divergences that reject a row where they are above the delta."""
    compared = rule.compared(grade)
    return compared[:1] if keeps_undecided and rule.is_bounded(grade) else compared


def upper_limits(condition: Condition, wanted: bool = True) -> Iterator[Limit]:
    """Where a condition wants a bare column below a literal number, from left to right.

    Args:
        condition: the tree.
        wanted: False under a `not`, where `seq_max_kl > 0.05` is the limit.
    """
    match condition:
        case Not(inner):
            yield from upper_limits(inner, not wanted)
        case And(conditions) | Or(conditions):
            for inner in conditions:
                yield from upper_limits(inner, wanted)
        case Comparison(operands, operators):
            for left, sign, right in zip(operands, operators, operands[1:], strict=False):
                yield from _limit(left, sign, right, wanted)


def _limit(left: Operand, sign: str, right: Operand, wanted: bool) -> Iterator[Limit]:
    if isinstance(left, Number):
        left, sign, right = right, _MIRRORED.get(sign, sign), left
    if isinstance(left, Column) and isinstance(right, Number) and sign in (("<", "<=") if wanted else (">", ">=")):
        yield left.name, right.value
