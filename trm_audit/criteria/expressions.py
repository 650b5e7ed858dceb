"""Conditions as users write them, `seq_max_kl <= 0.05 and 0.99 <= exp(seq_mean_log_ratio)`: parsed, never run as code.

    condition   := conjunction ("or" conjunction)*
    conjunction := negation ("and" negation)*
    negation    := "not" negation | comparison
    comparison  := operand (("<" | "<=" | ">" | ">=" | "==" | "!=") operand)+ | "(" condition ")"
    operand     := NUMBER | "inf" | NAME | "-" operand | FUNCTION "(" operand ")" | "(" operand ")"

A chain `a <= b <= c` is `a <= b and b <= c`. A NAME is a column, or a dotted path; a FUNCTION is exp, log, abs or sqrt.
There is no arithmetic. A null makes a comparison unknown, see `conditions`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trm_audit.criteria.conditions import (
    FUNCTIONS,
    OPERATORS,
    And,
    Call,
    Column,
    Comparison,
    Condition,
    Negative,
    Node,
    Not,
    Number,
    Operand,
    Or,
    Truth,
    columns_of,
    truth_of,
)
from trm_audit.errors import UsageError

_WORDS = ("and", "or", "not", "inf")
_MAX_DEPTH = 64
_TOKEN = re.compile(
    r"(?P<number>(?>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.]))"
    r"|(?P<name>[A-Za-z_]\w*(?:\.\w+)*)"
    r"|(?P<sign><=|>=|==|!=|<|>|\(|\)|-)",
    re.ASCII,
)
_EXAMPLE = "A condition looks like: seq_max_kl <= 0.05 and not (seq_mean_k3 > 2e-3 or num_tokens < 8)"
_HINTS = {"=": "Equality is written ==.", "&": "Write `and`.", "|": "Write `or`.", "!": "Write `not`."}


@dataclass(frozen=True)
class Expression:
    """A parsed condition. `str` gives a text that parses to an equal one; equal means the same tree.

    Attributes:
        condition: the tree.
        text: what the user wrote, for messages.
        place: the flag it was given with, for messages.
    """

    condition: Condition
    text: str = field(compare=False)
    place: str = field(compare=False)

    def __str__(self) -> str:
        return str(self.condition)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names used, each once, in the order in which they appear."""
        return tuple(dict.fromkeys(column.name for column in columns_of(self.condition)))

    def check_names(self, available: Collection[str]) -> None:
        """Raise UsageError, with names that are spelled alike, if a name is not among the available ones."""
        for column in columns_of(self.condition):
            if column.name not in available:
                near = difflib.get_close_matches(column.name, sorted(available), n=3)
                shown = f"Did you mean {' or '.join(near)}?" if near else f"Names are: {_some(available)}."
                raise self._error(f"nothing is named {column.name}", column, shown)

    def truth(self, columns: Mapping[str, Any]) -> Truth:
        """Whether the condition holds, per row.

        Args:
            columns: name -> numbers or booleans, [rows] or a scalar, NaN for null; those not named are not looked at.

        Returns:
            int8 (`conditions.TRUE`, ...), of the shape that the columns broadcast to; 0-d without columns.

        Raises:
            UsageError: a name is not among the columns, or its column holds no numbers.
        """
        self.check_names(columns)
        numbers = {}
        for column in columns_of(self.condition):
            values = np.asarray(columns[column.name])
            if values.dtype.kind not in "biuf":
                raise self._error(f"{column.name} does not hold numbers", column, "Conditions compare numbers only.")
            numbers[column.name] = values.astype(np.float64)
        with np.errstate(all="ignore"):
            return truth_of(self.condition, numbers)

    def _error(self, cause: str, column: Column, next_step: str) -> UsageError:
        return _error(cause, self.text, column.position, self.place, next_step)


def parse(text: str, place: str = "--keep") -> Expression:
    """Parse a condition (grammar above).

    Args:
        text: the condition.
        place: the flag it came from, for messages.

    Raises:
        UsageError: it does not fit the grammar; the message shows where.
    """
    return Expression(_Parser(text, place).whole(), text, place)


def _some(names: Collection[str], most: int = 12) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (", ..." if len(ordered) > most else "")


def _error(cause: str, text: str, position: int, place: str, next_step: str = _EXAMPLE) -> UsageError:
    shown = "".join(character if character.isprintable() else " " for character in text)
    return UsageError(f"{cause}\n    {shown}\n    {' ' * position}^", place=place, next_step=next_step)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    position: int


class _Parser:
    """Recursive descent, one method per line of the grammar.

    Operands and conditions share parentheses, so that a method may return either and its caller says what it needs.
    """

    def __init__(self, text: str, place: str) -> None:
        self.text, self.place = text, place
        self.tokens = list(self._tokens())
        self.index = 0
        self.depth = 0

    def _tokens(self) -> Iterator[_Token]:
        position = 0
        while position < len(self.text):
            if self.text[position].isspace():
                position += 1
                continue
            match = _TOKEN.match(self.text, position)
            if match is None:
                wrong = self.text[position]
                raise self._error(f"{wrong!r} has no meaning here", position, _HINTS.get(wrong, _EXAMPLE))
            yield _Token(str(match.lastgroup), match.group(), position)
            position = match.end()
        yield _Token("end", "", len(self.text))

    def _error(self, cause: str, position: int, next_step: str = _EXAMPLE) -> UsageError:
        return _error(cause, self.text, position, self.place, next_step)

    @property
    def token(self) -> _Token:
        return self.tokens[self.index]

    def _take(self, *texts: str) -> _Token | None:
        """The next token, taken, if it is one of these."""
        token = self.token
        if token.text not in texts or token.kind == "end":
            return None
        self.index += 1
        return token

    def whole(self) -> Condition:
        start = self.token.position
        condition = self._condition(self.disjunction(), start)
        if self.token.kind != "end":
            raise self._error(f"{self.token.text!r} is not expected here", self.token.position)
        return condition

    def disjunction(self) -> Node:
        return self._joined("or", self.conjunction, Or)

    def conjunction(self) -> Node:
        return self._joined("and", self.negation, And)

    def _joined(self, word: str, part: Callable[[], Node], join: type[And] | type[Or]) -> Node:
        parts = [(self.token.position, part())]
        while self._take(word):
            parts.append((self.token.position, part()))
        if len(parts) == 1:
            return parts[0][1]
        return join(tuple(self._condition(node, position) for position, node in parts))

    def negation(self) -> Node:
        if not self._take("not"):
            return self.comparison()
        position = self.token.position
        return Not(self._condition(self._nested(self.negation), position))

    def comparison(self) -> Node:
        parts = [(self.token.position, self.value())]
        operators = []
        while sign := self._take(*OPERATORS):
            operators.append(sign.text)
            parts.append((self.token.position, self.value()))
        if self.token.text == "-":
            hint = "There is no arithmetic, and names are spelled with _."
            raise self._error("a minus is not expected here", self.token.position, hint)
        if not operators:
            return parts[0][1]
        return Comparison(tuple(self._operand(node, position) for position, node in parts), tuple(operators))

    def value(self) -> Node:
        token = self.token
        if token.kind == "number" or token.text == "inf":
            self.index += 1
            return Number(float(token.text))
        if self._take("-"):
            return Negative(self._operand(self._nested(self.value), token.position + 1))
        if token.text == "(":
            return self._parenthesised()
        if token.kind == "name" and token.text not in _WORDS:
            self.index += 1
            return self._call(token) if self.token.text == "(" else Column(token.text, token.position)
        raise self._error("a number or a name is expected here", token.position)

    def _call(self, name: _Token) -> Call:
        if name.text not in FUNCTIONS:
            known = ", ".join(FUNCTIONS)
            raise self._error(f"there is no function {name.text}", name.position, f"Functions are: {known}.")
        return Call(name.text, self._operand(self._parenthesised(), name.position + len(name.text)))

    def _parenthesised(self) -> Node:
        opening = self.token
        self.index += 1
        node = self._nested(self.disjunction)
        if not self._take(")"):
            raise self._error("this parenthesis is not closed", opening.position)
        return node

    def _nested(self, part: Callable[[], Node]) -> Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self._error(f"nested more than {_MAX_DEPTH} deep", self.token.position)
        node = part()
        self.depth -= 1
        return node

    def _condition(self, node: Node, position: int) -> Condition:
        if isinstance(node, Condition):
            return node
        raise self._error("this is a number: a condition compares it with another", position)

    def _operand(self, node: Node, position: int) -> Operand:
        if isinstance(node, Operand):
            return node
        raise self._error("this is a condition, and a number is expected here", position)
