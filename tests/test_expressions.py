"""What conditions say, how they are read, and what a reader is told who wrote one that cannot be read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trm_audit.criteria.conditions import (
    FALSE,
    FUNCTIONS,
    OPERATORS,
    TRUE,
    UNKNOWN,
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
)
from trm_audit.criteria.expressions import Expression, parse
from trm_audit.errors import UsageError

NAN = math.nan
NAMES = ("a", "b", "seq_max_kl", "log")
CONDITIONS = {TRUE: "1 < 2", FALSE: "2 < 1", UNKNOWN: "null < 1"}


def truth(text: str, **columns: Any) -> list[int]:
    """Truth per row of an expression; `null` is a column of NaN."""
    return np.atleast_1d(parse(text).truth({"null": NAN, **columns})).tolist()


def error_of(text: str, **columns: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse(text).truth(columns)
    return caught.value


# What it says


@pytest.mark.parametrize(("left", "right"), [(left, right) for left in CONDITIONS for right in CONDITIONS])
def test_and_or_not_follow_the_three_valued_truth_tables(left: int, right: int) -> None:
    # GIVEN the tables of Kleene's logic, written out
    conjunction = FALSE if FALSE in (left, right) else UNKNOWN if UNKNOWN in (left, right) else TRUE
    disjunction = TRUE if TRUE in (left, right) else UNKNOWN if UNKNOWN in (left, right) else FALSE
    negation = {TRUE: FALSE, FALSE: TRUE, UNKNOWN: UNKNOWN}[left]
    # THEN the expressions say the same
    assert truth(f"{CONDITIONS[left]} and {CONDITIONS[right]}") == [conjunction]
    assert truth(f"{CONDITIONS[left]} or {CONDITIONS[right]}") == [disjunction]
    assert truth(f"not {CONDITIONS[left]}") == [negation]


@pytest.mark.parametrize(
    ("sign", "expected"),
    [
        ("<", [TRUE, FALSE, FALSE]),
        ("<=", [TRUE, TRUE, FALSE]),
        (">", [FALSE, FALSE, TRUE]),
        (">=", [FALSE, TRUE, TRUE]),
        ("==", [FALSE, TRUE, FALSE]),
        ("!=", [TRUE, FALSE, TRUE]),
    ],
)
def test_comparisons_mean_what_they_mean_elsewhere(sign: str, expected: list[int]) -> None:
    assert truth(f"a {sign} 0.05", a=np.array([0.04, 0.05, 0.06])) == expected


@pytest.mark.parametrize("text", ["a < 1", "a != 1", "a == a", "not a < 1", "not not a >= 1", "-a < 1", "exp(a) > 0"])
def test_whatever_is_compared_with_null_is_unknown(text: str) -> None:
    assert truth(text, a=np.array([NAN])) == [UNKNOWN]


def test_a_chain_holds_where_all_its_links_hold() -> None:
    ratio = np.log([0.98, 0.99, 1.0, 1.01, 1.02])
    assert truth("0.985 <= exp(x) <= 1.015", x=ratio) == [FALSE, TRUE, TRUE, TRUE, FALSE]
    assert truth("0 < 1 < x", x=np.array([2.0, 1.0, NAN])) == [TRUE, FALSE, UNKNOWN]


def test_a_chain_with_a_false_link_is_false_even_where_another_is_unknown() -> None:
    assert truth("null < x < 1", x=np.array([2.0, 0.5])) == [FALSE, UNKNOWN]


def test_and_binds_tighter_than_or_and_not_tighter_than_and() -> None:
    assert parse("a<1 or b<1 and not a<2 and b<2") == parse("(a<1) or ((b<1) and (not (a<2)) and (b<2))")


def test_functions_are_natural_and_unknown_outside_their_domain() -> None:
    columns = {"x": np.array([4.0, -1.0, 0.0])}
    assert truth("sqrt(x) == 2", **columns) == [TRUE, UNKNOWN, FALSE]
    assert truth("log(x) < -1e300", **columns) == [FALSE, UNKNOWN, TRUE]
    assert truth("abs(-x) >= 1", **columns) == [TRUE, TRUE, FALSE]
    assert truth("exp(log(x)) > 3.999", **columns) == [TRUE, UNKNOWN, FALSE]


def test_infinity_compares_as_a_number() -> None:
    columns = {"x": np.array([np.inf, -np.inf, 1.0])}
    assert truth("x == inf", **columns) == [TRUE, FALSE, FALSE]
    assert truth("-inf < x < inf", **columns) == [FALSE, FALSE, TRUE]
    assert truth("exp(1000) == inf") == [TRUE]


def test_booleans_and_integers_are_numbers_of_a_column_and_scalars_do_for_one_row() -> None:
    assert truth("ok == 1 and n >= 2", ok=np.array([True, False]), n=np.array([2, 3], np.int32)) == [TRUE, FALSE]
    assert truth("tokens.k3.p99.9 < 0.7", **{"tokens.k3.p99.9": 0.5}) == [TRUE]


def test_columns_are_named_once_in_the_order_of_the_text() -> None:
    expression = parse("b < a and not (exp(-c.d) < b or a < 1)")
    assert expression.columns == ("b", "a", "c.d")


def test_words_are_reserved_but_functions_are_not() -> None:
    assert parse("log < log(log)").columns == ("log",)
    assert parse("android < 1 and inference < 1").columns == ("android", "inference")


# How it is read

numbers = st.floats(min_value=0, allow_nan=False, allow_subnormal=False).map(Number)
leaves: st.SearchStrategy[Operand] = st.one_of(numbers, st.sampled_from(NAMES).map(Column))
operands: st.SearchStrategy[Operand] = st.recursive(
    leaves,
    lambda inner: st.one_of(st.builds(Negative, inner), st.builds(Call, st.sampled_from(sorted(FUNCTIONS)), inner)),
    max_leaves=3,
)


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    signs = draw(st.lists(st.sampled_from(sorted(OPERATORS)), min_size=1, max_size=3))
    parts = draw(st.lists(operands, min_size=len(signs) + 1, max_size=len(signs) + 1))
    return Comparison(tuple(parts), tuple(signs))


several = {"min_size": 2, "max_size": 3}
conditions: st.SearchStrategy[Condition] = st.recursive(
    comparisons(),
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.lists(inner, **several).map(lambda parts: And(tuple(parts))),
        st.lists(inner, **several).map(lambda parts: Or(tuple(parts))),
    ),
    max_leaves=6,
)
values = st.one_of(st.just(NAN), st.sampled_from([0.0, 1.0, -1.0, 0.05, np.inf]), st.floats(-5, 5))


@given(conditions)
def test_the_text_of_a_condition_parses_to_the_same_condition(condition: Condition) -> None:
    assert parse(str(condition)).condition == condition


class NoNumber(Exception):
    """What the oracles do about NaN."""


def known(value: float) -> float:
    if math.isnan(value):
        raise NoNumber
    return float(value)


class Row(dict[str, float]):
    """One row as variables; reading a null raises."""

    def __getitem__(self, name: str) -> float:
        return known(super().__getitem__(name))


@given(conditions, st.fixed_dictionaries(dict.fromkeys(NAMES, values)))
def test_a_condition_means_what_the_same_text_means_in_python(condition: Condition, row: dict[str, float]) -> None:
    # GIVEN Python's own reading of the same text, which stops at the first null that it has to look at
    functions = {name: lambda x, f=function: known(float(f(x))) for name, function in FUNCTIONS.items()}
    spelled = str(condition).replace("log(", "ln(")  # a column of our test is called log, too
    scope = {**functions, "ln": functions["log"], "inf": math.inf, "__builtins__": {}}
    # WHEN it comes to a verdict THEN ours is the same one
    with np.errstate(all="ignore"):
        try:
            expected = eval(spelled, scope, Row(row))  # an oracle, on text that this test made
        except NoNumber:
            return
    assert int(parse(str(condition)).truth(row)) == (TRUE if expected else FALSE)


def oracle(node: Node, row: dict[str, float]) -> Any:
    """Value or truth of one row, None for unknown, in plain Python."""
    match node:
        case Number(value):
            return value
        case Column(name):
            return row[name]
        case Negative(inner):
            return -oracle(inner, row)
        case Call(function, inner):
            return float(FUNCTIONS[function](oracle(inner, row)))
        case Not(inner):
            return None if (found := oracle(inner, row)) is None else not found
        case And(parts):
            found = [oracle(part, row) for part in parts]
            return False if False in found else None if None in found else True
        case Or(parts):
            found = [oracle(part, row) for part in parts]
            return True if True in found else None if None in found else False
        case Comparison(parts, signs):
            found = [oracle(part, row) for part in parts]
            links = [linked(*link) for link in zip(found, signs, found[1:], strict=False)]
            return False if False in links else None if None in links else True


def linked(left: float, sign: str, right: float) -> bool | None:
    if math.isnan(left) or math.isnan(right):
        return None
    equal, below = left == right, left < right
    return {"<": below, "<=": below or equal, ">": right < left, ">=": right <= left, "==": equal, "!=": not equal}[
        sign
    ]


@given(conditions, st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, values)), min_size=1, max_size=5))
def test_rows_with_nulls_are_judged_as_one_by_one_in_plain_python(
    condition: Condition, rows: list[dict[str, float]]
) -> None:
    columns = {name: np.array([row[name] for row in rows]) for name in NAMES}
    with np.errstate(all="ignore"):
        expected = [{True: TRUE, False: FALSE, None: UNKNOWN}[oracle(condition, row)] for row in rows]
    found = Expression(condition, str(condition), "--keep").truth(columns)
    assert np.broadcast_to(found, len(rows)).tolist() == expected


# What a reader is told


@pytest.mark.parametrize(
    ("text", "cause", "column"),
    [
        ("", "a number or a name is expected here", 0),
        ("seq_max_kl", "this is a number", 0),
        ("a < 1 and b", "this is a number", 10),
        ("a < ", "a number or a name is expected here", 4),
        ("a < 1 or and b < 1", "a number or a name is expected here", 9),
        ("a < not b", "a number or a name is expected here", 4),
        ("(a < 1", "this parenthesis is not closed", 0),
        ("exp(a < 1", "this parenthesis is not closed", 3),
        ("a < 1)", "')' is not expected here", 5),
        ("a < 1 2", "'2' is not expected here", 6),
        ("a = 1", "'=' has no meaning here", 2),
        ("a < 1 && b < 1", "'&' has no meaning here", 6),
        ("a < 5%", "'%' has no meaning here", 5),
        ("a < 1abc", "'1' has no meaning here", 4),
        ("a < 0.0.5", "'0' has no meaning here", 4),
        ("a < nan", "nothing is named nan", 4),
        ("seq-max-kl < 1", "a minus is not expected here", 3),
        ("(a < 1) < 2", "this is a condition, and a number is expected here", 0),
        ("exp(a < 1) < 2", "this is a condition, and a number is expected here", 3),
        ("-(a < 1) < 2", "this is a condition, and a number is expected here", 1),
        ("__import__(a) < 1", "there is no function __import__", 0),
    ],
)
def test_an_error_stands_under_the_place_that_it_is_about(text: str, cause: str, column: int) -> None:
    error = error_of(text, a=1.0)
    assert error.place == "--keep"
    assert error.next_step
    assert error.cause.splitlines()[0].startswith(cause)
    assert error.cause.splitlines()[1:] == ["    " + text, "    " + " " * column + "^"]


def test_an_unknown_name_is_answered_with_names_spelled_alike() -> None:
    error = error_of("seq_mean_k3 < 1 and seq_mx_kl < 1", seq_mean_k3=1.0, seq_max_kl=1.0, reward=1.0)
    assert error.next_step == "Did you mean seq_max_kl or seq_mean_k3?"
    assert error.cause.splitlines()[2] == "    " + " " * 20 + "^"


def test_an_unknown_name_like_no_other_is_answered_with_what_there_is() -> None:
    assert error_of("zzz < 1", reward=1.0, grade="exact").next_step == "Names are: grade, reward."


def test_a_column_of_strings_is_refused() -> None:
    assert "grade does not hold numbers" in str(error_of("grade < 1", grade=np.array(["exact"], dtype=object)))


@pytest.mark.parametrize("opening", ["(", "-", "not ", "abs("])
def test_nesting_has_a_limit_and_says_so(opening: str) -> None:
    assert "nested more than" in str(error_of(opening * 5000 + "a < 1"))


def test_line_breaks_and_escapes_do_not_move_the_caret_or_reach_the_terminal() -> None:
    error = error_of("a < 1\nand \x1b[31m")
    assert error.cause.splitlines()[1:] == ["    a < 1 and  [31m", "    " + " " * 10 + "^"]


def test_the_place_is_the_flag_that_the_text_came_from() -> None:
    with pytest.raises(UsageError, match=r"^--fail-on: "):
        parse("acceptance", place="--fail-on")
