"""Conditions on named numbers, as trees, and their truth (numpy). What a user writes is parsed in `expressions`.

The logic is Kleene's with three values: a comparison with a null (NaN) is unknown, `not unknown` is unknown, and
`unknown or true` is true. Whoever keeps rows keeps the true ones only: no row is kept because a number is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trm_audit.numerics.ragged import Floats

Truth = NDArray[np.int8]
TRUE, UNKNOWN, FALSE = 1, 0, -1
"""Truth as int8: `and` is the minimum, `or` the maximum, `not` the negative."""

FUNCTIONS: dict[str, Callable[[Any], Any]] = {"exp": np.exp, "log": np.log, "abs": np.abs, "sqrt": np.sqrt}
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
    "==": np.equal,
    "!=": np.not_equal,
}


@dataclass(frozen=True)
class Number:
    """A literal, at least 0 (a minus in front is `Negative`)."""

    value: float

    def __str__(self) -> str:
        return repr(self.value).removesuffix(".0")


@dataclass(frozen=True)
class Column:
    """A named number. `position` is where the name stands in the text; it does not matter to equality."""

    name: str
    position: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Negative:
    """Minus an operand."""

    operand: Operand

    def __str__(self) -> str:
        return f"-{self.operand}"


@dataclass(frozen=True)
class Call:
    """exp, log, abs or sqrt of an operand. Outside its domain it is NaN, and comparing with it unknown."""

    function: str
    operand: Operand

    def __str__(self) -> str:
        return f"{self.function}({self.operand})"


@dataclass(frozen=True)
class Comparison:
    """A chain: `operands[i] operators[i] operands[i + 1]` for every i."""

    operands: tuple[Operand, ...]
    operators: tuple[str, ...]

    def __str__(self) -> str:
        rest = (f" {sign} {operand}" for sign, operand in zip(self.operators, self.operands[1:], strict=True))
        return str(self.operands[0]) + "".join(rest)


@dataclass(frozen=True)
class Not:
    """True where the condition is false."""

    condition: Condition

    def __str__(self) -> str:
        return f"not {_enclosed(self.condition, And, Or)}"


@dataclass(frozen=True)
class And:
    """False where one of the conditions is false, true where all are true."""

    conditions: tuple[Condition, ...]

    def __str__(self) -> str:
        return " and ".join(_enclosed(condition, And, Or) for condition in self.conditions)


@dataclass(frozen=True)
class Or:
    """True where one of the conditions is true, false where all are false."""

    conditions: tuple[Condition, ...]

    def __str__(self) -> str:
        return " or ".join(_enclosed(condition, Or) for condition in self.conditions)


Operand = Number | Column | Negative | Call
Condition = Comparison | Not | And | Or
Node = Operand | Condition


def _enclosed(condition: Condition, *kinds: type) -> str:
    return f"({condition})" if isinstance(condition, kinds) else str(condition)


def columns_of(node: Node) -> Iterator[Column]:
    """Every place where a tree names a column, from left to right."""
    match node:
        case Column():
            yield node
        case Negative(operand) | Call(_, operand):
            yield from columns_of(operand)
        case Not(condition):
            yield from columns_of(condition)
        case Comparison(operands, _):
            for operand in operands:
                yield from columns_of(operand)
        case And(conditions) | Or(conditions):
            for condition in conditions:
                yield from columns_of(condition)


def _value(operand: Operand, numbers: Mapping[str, Floats]) -> Floats:
    match operand:
        case Number(value):
            return np.asarray(value)
        case Column(name):
            return numbers[name]
        case Negative(inner):
            return np.negative(_value(inner, numbers))
        case Call(function, inner):
            return np.asarray(FUNCTIONS[function](_value(inner, numbers)))


def truth_of(condition: Condition, numbers: Mapping[str, Floats]) -> Truth:
    """TRUE, UNKNOWN or FALSE per row.

    Args:
        condition: the tree.
        numbers: name -> [rows] or a scalar, for each column of the tree; NaN for null.

    Returns:
        int8, of the shape that the columns broadcast to; 0-d for a condition without columns.

    Source: Kleene, Introduction to Metamathematics (1952), section 64.
    """
    match condition:
        case Comparison(operands, operators):
            values = [_value(operand, numbers) for operand in operands]
            links = zip(values, operators, values[1:], strict=False)
            return reduce(np.minimum, (_compared(left, sign, right) for left, sign, right in links))
        case Not(inner):
            return np.negative(truth_of(inner, numbers))
        case And(conditions):
            return reduce(np.minimum, (truth_of(inner, numbers) for inner in conditions))
        case Or(conditions):
            return reduce(np.maximum, (truth_of(inner, numbers) for inner in conditions))


def _compared(left: Floats, sign: str, right: Floats) -> Truth:
    unknown = np.isnan(left) | np.isnan(right)
    return np.where(unknown, UNKNOWN, np.where(OPERATORS[sign](left, right), TRUE, FALSE)).astype(np.int8)
