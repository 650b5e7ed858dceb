"""Conditions for CI on the report's numbers: `acceptance<0.7`, `tokens.k3.mean>1e-3`, `sequences.seq_max_kl.p99>=0.05`.

A gate names what must not be. Names are paths into the JSON report, parts joined by dots, entries of lists by number.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from trm_audit.errors import UsageError
from trm_audit.report.summary import numbers

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_GATE = re.compile(r"\s*([^\s<>=!]+)\s*(<=|>=|==|!=|<|>)\s*(\S+)\s*")


@dataclass(frozen=True)
class Gate:
    """NAME OP NUMBER; the gate fails where this holds.

    Worked instance: Gate("acceptance", "<", 0.7).
    """

    name: str
    op: str
    number: float

    def __str__(self) -> str:
        return f"{self.name}{self.op}{self.number:g}"


def parse_gate(text: str) -> Gate:
    """A gate from its text.

    Raises:
        UsageError: it is not NAME OP NUMBER.
    """
    found = _GATE.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        number = float(found[3])
        if number != number:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"cannot read the condition {text!r}",
            place="--fail-on",
            next_step='Write NAME OP NUMBER with one of < <= > >= == !=, as in --fail-on "acceptance<0.7".',
        ) from None
    return Gate(found[1], found[2], number)


class Report(Protocol):
    """A summary or a comparison."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""


def check(gates: Iterable[Gate], summary: Report) -> list[str]:
    """One message per gate that fails: its condition holds, or the report does not know the number.

    Raises:
        UsageError: a name that is no number of the report; the message lists near ones.
    """
    report = summary.to_dict()
    return [message for gate in gates if (message := _failure(gate, report))]


def _failure(gate: Gate, report: dict[str, Any]) -> str:
    value = _look_up(gate.name, report)
    if value is None:
        judged = "; give --delta-max or --keep" if gate.name == "acceptance" else ""
        return f"{gate.name} is not known from these data, so {gate} cannot be ruled out{judged}"
    return f"{gate.name} is {value:.6g} ({gate})" if _OPERATORS[gate.op](value, gate.number) else ""


def _look_up(name: str, report: dict[str, Any]) -> float | None:
    value: Any = report
    for at, part in enumerate(parts := name.split(".")):
        if value is None and at < len(parts):
            return None
        value = _step(value, part, name, report)
    if value in ("inf", "-inf"):
        return float(value)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise _unknown(name, report)


def _step(value: Any, part: str, name: str, report: dict[str, Any]) -> Any:
    if isinstance(value, dict) and part in value:
        return value[part]
    if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
        return value[int(part)]
    raise _unknown(name, report)


def _unknown(name: str, report: dict[str, Any]) -> UsageError:
    names = [".".join(path) for path, _ in numbers(report)]
    near = [known for known in names if known.endswith((f".{name}", f".{name}.value"))][:4]
    near += difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    listed = ", ".join(dict.fromkeys(near)) or ", ".join(key for key in report if not isinstance(report[key], str))
    return UsageError(
        f"the report has no number named {name!r}",
        place="--fail-on",
        next_step=f"Names are paths into the JSON report (report --json). Near: {listed}.",
    )
