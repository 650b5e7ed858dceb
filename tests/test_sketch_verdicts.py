"""Verdicts on sketched rows, alone and beside rows of the other grades: what keeps, what rejects, what stays open."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trm_audit.criteria.limits import limits
from trm_audit.criteria.thresholds import Criteria, Undecided, needed_columns
from trm_audit.criteria.verdicts import causes, decide
from trm_audit.errors import BadInput, UsageError
from trm_audit.numerics.divergences import divergences
from trm_audit.numerics.ragged import sequence_statistics
from trm_audit.numerics.sketch import sketch
from trm_audit.numerics.sketch_bounds import compare_sketch
from trm_audit.rollout import GRADES

NAN, INF = math.nan, math.inf
Row = dict[str, Any]

UNDECIDED: tuple[Undecided, ...] = ("mask", "keep", "error")


def sketched(**columns: list[float]) -> dict[str, np.ndarray[Any, Any]]:
    """A batch of sketched rows of five tokens each, with finite kl unless it says otherwise."""
    rows = len(next(iter(columns.values())))
    given = {"num_tokens": [5] * rows, "seq_max_kl_lower": [0.0] * rows, **columns}
    return {"grade": np.array(["sketch"] * rows, dtype=object), **{k: np.array(v) for k, v in given.items()}}


# One criterion at a time


def test_by_default_the_estimate_of_kl_decides_on_sketches_with_equality_kept() -> None:
    batch = sketched(
        seq_max_kl_estimate=[0.05, np.nextafter(0.05, 1), 0.01, NAN],
        seq_mean_kl_estimate=[0.001, 0.001, 0.01, 0.0],
        seq_argmax_kl_estimate=[1, 3, 0, -1],
    )
    assert decide(Criteria(delta_max=0.05, delta_avg=0.002), batch).reason == [
        None,
        "seq_max_kl_estimate_above_delta_max(value=0.05, position=3, delta=0.05)",
        "seq_mean_kl_estimate_above_delta_avg(value=0.01, delta=0.002)",
        "not_a_number(column=seq_max_kl_estimate)",
    ]


BOUNDS = {
    "seq_max_tv_lower": [0.0, 0.01, 0.05, 0.06, 0.0],
    "seq_max_tv_upper": [0.05, 0.2, 0.06, 0.2, NAN],
    "seq_argmax_tv_lower": [0, 1, 2, 3, 4],
}


@pytest.mark.parametrize(("undecided", "kept"), [("mask", [0]), ("keep", [0, 1, 2])])
def test_the_bounds_of_a_sketch_keep_reject_or_leave_open(undecided: Undecided, kept: list[int]) -> None:
    found = decide(Criteria(delta_max=0.05, max_of="tv", undecided=undecided), sketched(**BOUNDS))
    assert np.flatnonzero(found.keep).tolist() == kept
    assert found.reason[3] == "seq_max_tv_lower_above_delta_max(value=0.06, position=3, delta=0.05)"
    assert found.reason[4] == "not_a_number(column=seq_max_tv_upper)"
    if undecided == "mask":
        assert found.reason[1] == "undecided_seq_max_tv(lower=0.01, upper=0.2, delta=0.05)"


def test_a_token_that_the_trainer_excludes_rejects_the_row_whatever_decides() -> None:
    batch = sketched(
        seq_max_kl_lower=[INF, 0.0],
        seq_max_kl_upper=[INF, 0.01],
        seq_argmax_kl_lower=[7, 0],
        seq_max_k2=[0.0, 0.0],
        seq_max_tv_lower=[0.0, 0.0],
        seq_max_tv_upper=[0.0, 0.0],
        seq_max_kl_estimate=[0.0, 0.0],
    )
    for settings in (
        {"max_of": "k2"},
        {"max_of": "tv", "undecided": "keep"},
        {},
        {"max_of": "kl", "on_estimate": True},
    ):
        found = decide(Criteria(delta_max=0.05, **settings), batch)
        assert found.reason == ["seq_max_kl_infinite(position=7)", None]


def test_one_threshold_on_kl_decides_on_exact_and_sketched_rows_by_what_each_knows() -> None:
    # GIVEN rows of which the estimate, the bounds and the kl of an exact row would each say something else
    batch = {
        "grade": np.array(["exact", "sketch", "exact", "sketch", "interval"], dtype=object),
        "num_tokens": np.full(5, 5),
        "seq_max_kl": np.array([0.04, NAN, 0.06, NAN, NAN]),
        "seq_max_kl_estimate": np.array([NAN, 0.04, NAN, 0.06, NAN]),
        "seq_max_kl_lower": np.array([NAN, 0.0, NAN, 0.0, 0.0]),
        "seq_max_kl_upper": np.array([NAN, 9.0, NAN, 9.0, 9.0]),
    }
    # WHEN the estimate may decide THEN it does on sketched rows, and on no other
    found = decide(Criteria(delta_max=0.05, max_of="kl", on_estimate=True), batch)
    assert [reason and causes(reason)[0] for reason in found.reason] == [
        None,
        None,
        "seq_max_kl_above_delta_max",
        "seq_max_kl_estimate_above_delta_max",
        "undecided_seq_max_kl",
    ]
    # WHEN it may not THEN sketched rows are as open as those of an interval
    found = decide(Criteria(delta_max=0.05, max_of="kl"), batch)
    assert [reason and causes(reason)[0] for reason in found.reason] == [
        None,
        "undecided_seq_max_kl",
        "seq_max_kl_above_delta_max",
        "undecided_seq_max_kl",
        "undecided_seq_max_kl",
    ]


def error_on(batch: dict[str, np.ndarray[Any, Any]], **settings: Any) -> BadInput:
    with pytest.raises(BadInput) as caught:
        decide(Criteria(delta_max=0.05, undecided="error", **settings), batch)
    return caught.value


def test_an_error_about_an_undecided_sketch_names_the_estimate_that_would_decide() -> None:
    between = {f"seq_{kind}_{d}_{end}": [v] for kind in ("max", "mean") for d in ("kl", "tv") for end, v in ENDS}
    batch = sketched(**between, seq_max_kl_estimate=[0.04], seq_mean_kl_estimate=[0.04])
    by_kl = error_on(batch, max_of="kl", delta_avg=0.02, avg_of="kl")
    assert by_kl.cause.startswith("undecided: seq_max_kl(lower=0.01, upper=0.2, delta=0.05)")
    assert by_kl.next_step == "Use --undecided mask or keep, or let the estimate of kl decide with --on-estimate."
    # THEN doing what the message says decides
    settings = {"max_of": "kl", "delta_avg": 0.02, "avg_of": "kl", "on_estimate": True}
    found = decide(Criteria(delta_max=0.05, undecided="error", **settings), batch)
    assert found.reason == ["seq_mean_kl_estimate_above_delta_avg(value=0.04, delta=0.02)"]
    # THEN it is not offered for tv, which it would leave open
    for both in ({"max_of": "tv"}, {"max_of": "kl", "delta_avg": 0.05, "avg_of": "tv"}):
        assert error_on(batch, **both).next_step.endswith("since tv has none: --max-of kl --on-estimate.")
    # THEN rows of an interval, which have no estimate of kl, are sent to k2
    interval = {**batch, "grade": np.array(["interval"], dtype=object)}
    assert error_on(interval, max_of="kl").next_step.endswith("name an estimate with --max-of k2 --avg-of k3.")


ENDS = (("lower", 0.01), ("upper", 0.2))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [("seq_max_kl_estimate", 0.05)]),
        ({"max_of": "kl"}, [("seq_max_kl_lower", 0.05), ("seq_max_kl_upper", 0.05)]),
        ({"max_of": "kl", "undecided": "keep"}, [("seq_max_kl_lower", 0.05)]),
        ({"max_of": "kl", "undecided": "keep", "on_estimate": True}, [("seq_max_kl_estimate", 0.05)]),
    ],
    ids=str,
)
def test_the_limits_of_sketches_are_those_of_what_decides(settings: Row, expected: list[tuple[str, float]]) -> None:
    assert limits(Criteria(delta_max=0.05, **settings), ["sketch"]) == expected


# Against a plain reading of the rules

SAMPLED = ("k2", "k3", "abs_log_ratio")
BOUND_ENDS = ("kl_lower", "kl_upper", "tv_lower", "tv_upper")
KNOWN = {
    "exact": ("kl", "kl_reverse", "tv", *SAMPLED),
    "sketch": ("kl_estimate", *BOUND_ENDS, *SAMPLED),
    "interval": (*BOUND_ENDS, *SAMPLED),
    "sampled": SAMPLED,
}
"""What score writes for a row of each grade."""
KINDS = ("max", "mean", "sum")
FLAGS = {"max": ("delta_max", "max_of"), "mean": ("delta_avg", "avg_of"), "sum": ("delta_total", "total_of")}
ALL = sorted({name for names in KNOWN.values() for name in names})
cells = st.sampled_from([0.0, 0.0, 0.01, 0.02, 0.03, 0.05, 0.05, 0.2, INF])
Rule = tuple[str, str | None, float]


@st.composite
def scored_rows(draw: st.DrawFn, grades: tuple[str, ...] = GRADES) -> list[Row]:
    """Rows with a number, sometimes NaN, for what their grade knows, NaN for everything else, and ordered bounds."""
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        row: Row = {"grade": draw(st.sampled_from(grades)), "num_tokens": draw(st.sampled_from([0, 1, 5, 5, 5, 5]))}
        for kind in KINDS:
            row |= {f"seq_{kind}_{name}": draw(cells) if name in KNOWN[row["grade"]] else NAN for name in ALL}
            for name in ("kl", "tv"):
                ends = [row[f"seq_{kind}_{name}_{end}"] for end in ("lower", "upper")]
                row |= dict(zip((f"seq_{kind}_{name}_lower", f"seq_{kind}_{name}_upper"), sorted(ends), strict=True))
        if draw(st.integers(0, 9)) == 0:
            row[draw(st.sampled_from(sorted(name for name in row if name.startswith("seq_"))))] = NAN
        rows.append(row)
    return rows


rules = st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True).flatmap(
    lambda kinds: st.tuples(
        *(
            st.tuples(
                st.just(kind),
                st.sampled_from([None, "kl", "kl", "tv", "tv", "kl_reverse", "kl_estimate", *SAMPLED]),
                st.sampled_from([0.0, 0.03, 0.05]),
            )
            for kind in kinds
        )
    )
)


def criteria_of(chosen: tuple[Rule, ...], **settings: Any) -> Criteria:
    given = {name: value for kind, of, delta in chosen for name, value in zip(FLAGS[kind], (delta, of), strict=True)}
    return Criteria(**given, **settings)


def columns_of(rows: list[Row]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.array([r[name] for r in rows], object if name == "grade" else float) for name in rows[0]}


def by_hand(row: Row, rule: Rule, on_estimate: bool) -> str:
    """`kept`, `rejected` or `between`, for one row and one threshold, as the documents say it."""
    kind, of, delta = rule
    grade = row["grade"]
    own = {name: row[f"seq_{kind}_{name}"] for name in ALL}
    veto = False
    if of is None:
        veto = grade == "interval"
        sampled = "k2" if kind == "max" else "k3"
        of = {"exact": "kl", "sketch": "kl_estimate"}.get(grade, sampled)
    if of == "kl" and grade == "sketch" and on_estimate:
        of = "kl_estimate"
    if of in ("kl", "tv") and grade in ("sketch", "interval"):
        low, high = own[f"{of}_lower"], own[f"{of}_upper"]
        if math.isnan(low) or math.isnan(high) or low > delta:
            return "rejected"
        return "kept" if high <= delta else "between"
    return "kept" if own[of] <= delta and (not veto or own["kl_lower"] <= delta) else "rejected"


def row_by_hand(row: Row, chosen: tuple[Rule, ...], on_estimate: bool) -> str:
    proof = {"exact": "seq_max_kl", "sketch": "seq_max_kl_lower", "interval": "seq_max_kl_lower"}.get(row["grade"])
    if row["num_tokens"] == 0 or (proof is not None and not row[proof] < INF):
        return "rejected"
    found = {by_hand(row, rule, on_estimate) for rule in chosen}
    return next(verdict for verdict in ("rejected", "between", "kept") if verdict in found)


def is_answerable(rows: list[Row], chosen: tuple[Rule, ...]) -> bool:
    """Whether the criteria mean something for all rows: an unnamed D needs one grade, a named one rows that tell it."""
    grades = {row["grade"] for row in rows if row["num_tokens"]}
    for _, of, _ in chosen:
        if of is None and len(grades) > 1:
            return False
        for grade in grades if of is not None else ():
            told = {*KNOWN[grade]} | ({"kl", "tv"} if grade in ("sketch", "interval") else set())
            if of not in told:
                return False
    return True


@given(
    st.one_of(scored_rows(), scored_rows(("sketch",)), scored_rows(("exact", "sketch")), scored_rows(("interval",))),
    rules,
    st.sampled_from(UNDECIDED),
    st.booleans(),
)
def test_verdicts_on_rows_of_all_grades_equal_a_plain_reading_of_the_rules(
    rows: list[Row], chosen: tuple[Rule, ...], undecided: Undecided, on_estimate: bool
) -> None:
    on_estimate = on_estimate and any(of in (None, "kl", "kl_estimate") for _, of, _ in chosen)
    criteria = criteria_of(chosen, undecided=undecided, on_estimate=on_estimate)
    batch = columns_of(rows)
    if not is_answerable(rows, chosen):
        with pytest.raises(UsageError):
            decide(criteria, batch)
        return
    needed = needed_columns(criteria, {row["grade"] for row in rows if row["num_tokens"]}, batch)
    expected = [row_by_hand(row, chosen, on_estimate) for row in rows]
    if undecided == "error" and "between" in expected:
        with pytest.raises(BadInput, match=f"row {expected.index('between')}: undecided"):
            decide(criteria, {name: batch[name] for name in needed})
        return
    found = decide(criteria, {name: batch[name] for name in needed})
    kept = ("kept", "between") if undecided == "keep" else ("kept",)
    assert found.keep.tolist() == [verdict in kept for verdict in expected]
    assert [reason is None for reason in found.reason] == found.keep.tolist()
    if undecided == "mask":
        only_open = [bool(r) and all(c.startswith("undecided_seq_") for c in causes(str(r))) for r in found.reason]
        assert only_open == [verdict == "between" for verdict in expected]


# On distributions

V, T, K, M = 3000, 12, 20, 64
DELTAS = (0.003, 0.01, 0.02, 0.05, 0.1, 0.3)


@pytest.fixture(scope="module")
def both_ways() -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """60 sequences of rollout and trainer distributions from near to far, scored exactly and from sketches."""
    rng = torch.Generator().manual_seed(5)
    shape = torch.randn(60 * T, V, generator=rng) * 2.5
    distance = torch.logspace(-2, 0.2, 60).repeat_interleave(T)[:, None]
    sampler, trainer = shape, shape + distance * torch.randn(60 * T, V, generator=rng)
    positions = np.full(60 * T, T)
    found = compare_sketch(sketch(sampler, K, M, 1), trainer, seed=1, positions=positions, step=2.0**-24)
    exact = divergences(sampler, trainer)
    return {
        "exact": sequences("exact", kl=exact.kl, tv=exact.tv),
        "sketch": sequences("sketch", **{name: getattr(found, name) for name in ("kl_estimate", *BOUND_ENDS)}),
    }


def sequences(grade: str, **tokens: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
    columns: dict[str, Any] = {"grade": np.array([grade] * 60, dtype=object), "num_tokens": np.full(60, T)}
    for name, values in tokens.items():
        offsets = np.arange(0, 60 * T + 1, T)
        statistics = sequence_statistics(values.double().numpy(), offsets, np.ones(60 * T, dtype=bool))
        columns |= {f"seq_{kind}_{name}": getattr(statistics, kind) for kind in KINDS}
        columns[f"seq_argmax_{name}"] = statistics.argmax
    return columns


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("kind", ["max", "mean"])
@pytest.mark.parametrize("of", ["kl", "tv"])
def test_what_bounds_keep_or_reject_is_what_the_exact_value_keeps_or_rejects(
    both_ways: dict[str, dict[str, np.ndarray[Any, Any]]], of: str, kind: str, delta: float
) -> None:
    exact = decide(criteria_of(((kind, of, delta),)), both_ways["exact"]).keep
    masked = decide(criteria_of(((kind, of, delta),), undecided="mask"), both_ways["sketch"])
    lenient = decide(criteria_of(((kind, of, delta),), undecided="keep"), both_ways["sketch"])
    assert (masked.keep <= exact).all()
    assert (exact <= lenient.keep).all()
    # THEN what is kept is certified, and the rows that the two differ on are those between the bounds
    lower, upper = (both_ways["sketch"][f"seq_{kind}_{of}_{end}"] for end in ("lower", "upper"))
    assert (upper[masked.keep] <= delta).all()
    between = (lower <= delta) & (delta < upper)
    assert (lenient.keep & ~masked.keep).tolist() == between.tolist()
    named = [str(reason).startswith(f"undecided_seq_{kind}_{of}(") for reason in masked.reason]
    assert named == between.tolist()


def test_some_rows_are_certain_and_some_are_open_so_that_the_claims_above_are_about_both(
    both_ways: dict[str, dict[str, np.ndarray[Any, Any]]],
) -> None:
    for of, delta in (("kl", 0.05), ("tv", 0.1)):
        found = decide(criteria_of((("max", of, delta),)), both_ways["sketch"])
        cause = ["kept" if reason is None else causes(reason)[0].split("_")[0] for reason in found.reason]
        assert set(cause) == {"kept", "seq", "undecided"}


@pytest.mark.parametrize("delta", DELTAS)
def test_the_estimate_keeps_what_it_puts_at_most_at_the_threshold_and_nearly_always_what_is_there(
    both_ways: dict[str, dict[str, np.ndarray[Any, Any]]], delta: float
) -> None:
    batch = both_ways["sketch"]
    by_flag = decide(Criteria(delta_max=delta, max_of="kl", on_estimate=True), batch).keep
    assert by_flag.tolist() == (batch["seq_max_kl_estimate"] <= delta).tolist()
    assert by_flag.tolist() == decide(Criteria(delta_max=delta), batch).keep.tolist()
    exact = decide(Criteria(delta_max=delta), both_ways["exact"]).keep
    assert np.count_nonzero(by_flag != exact) <= 3  # of 60
