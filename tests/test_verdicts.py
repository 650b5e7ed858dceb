"""What is kept, what is not, and the reason that stands beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trm_audit.criteria.thresholds import Criteria, needed_columns, resolve
from trm_audit.criteria.verdicts import Verdicts, causes, decide
from trm_audit.errors import BadInput, UsageError
from trm_audit.numerics.estimators import sampled_divergences
from trm_audit.numerics.ragged import sequence_statistics

NAN, INF = math.nan, math.inf
VERL = Path(__file__).parent / "data" / "verl-first48.parquet"


def scores(grade: str | list[str], **columns: list[float]) -> dict[str, np.ndarray[Any, Any]]:
    """A batch whose rows have five tokens each unless `num_tokens` says otherwise."""
    rows = len(next(iter(columns.values())))
    grades = [grade] * rows if isinstance(grade, str) else grade
    given = {"num_tokens": [5] * rows, **columns}
    return {"grade": np.array(grades, dtype=object), **{name: np.array(values) for name, values in given.items()}}


def reasons(criteria: Criteria, batch: dict[str, np.ndarray[Any, Any]]) -> list[str | None]:
    """The reasons; on the way, a row is kept if and only if it has none."""
    verdicts = decide(criteria, batch)
    assert verdicts.keep.dtype == bool
    assert verdicts.keep.tolist() == [reason is None for reason in verdicts.reason]
    return verdicts.reason


# Thresholds


def test_equality_is_kept_and_the_next_number_is_not() -> None:
    batch = scores("sampled", seq_max_k2=[0.05, np.nextafter(0.05, 1)], seq_argmax_k2=[3, 17])
    assert decide(Criteria(delta_max=0.05), batch).keep.tolist() == [True, False]


@pytest.mark.parametrize(
    ("criteria", "column", "reason"),
    [
        (Criteria(delta_max=0.05), "seq_max_kl", "seq_max_kl_above_delta_max(value=0.0612, position=17, delta=0.05)"),
        (Criteria(delta_avg=0.05), "seq_mean_kl", "seq_mean_kl_above_delta_avg(value=0.0612, delta=0.05)"),
        (Criteria(delta_total=0.05), "seq_sum_kl", "seq_sum_kl_above_delta_total(value=0.0612, delta=0.05)"),
        (
            Criteria(delta_max=0.05, max_of="tv"),
            "seq_max_tv",
            "seq_max_tv_above_delta_max(value=0.0612, position=17, delta=0.05)",
        ),
    ],
)
def test_a_reason_gives_the_cause_its_value_and_the_threshold(criteria: Criteria, column: str, reason: str) -> None:
    batch = scores("exact", **{"seq_max_kl": [0.01, 0.01], column: [0.04, 0.0612]})
    batch["seq_argmax_" + column.removeprefix("seq_max_")] = np.array([2, 17], dtype=np.int32)
    assert reasons(criteria, batch) == [None, reason]


def test_without_positions_the_reason_has_none() -> None:
    batch = scores("sampled", seq_max_k2=[0.2])
    assert reasons(Criteria(delta_max=0.05), batch) == ["seq_max_k2_above_delta_max(value=0.2, delta=0.05)"]


def test_every_violated_criterion_is_named_in_the_order_max_mean_sum_expression() -> None:
    criteria = Criteria(delta_total=0.5, delta_avg=0.002, delta_max=0.05, keep="seq_max_k2 < 0.1 or reward > 0")
    batch = scores("sampled", seq_max_k2=[0.2, 0.01], seq_mean_k3=[0.01, 0.01], seq_sum_k3=[1, 0.1], reward=[0, 0])
    found = reasons(criteria, batch)
    assert found[0] == (
        "seq_max_k2_above_delta_max(value=0.2, delta=0.05); seq_mean_k3_above_delta_avg(value=0.01, delta=0.002); "
        "seq_sum_k3_above_delta_total(value=1, delta=0.5); keep_expression_false(seq_max_k2=0.2, reward=0)"
    )
    assert causes(str(found[0])) == [
        "seq_max_k2_above_delta_max",
        "seq_mean_k3_above_delta_avg",
        "seq_sum_k3_above_delta_total",
        "keep_expression_false",
    ]
    assert causes(str(found[1])) == ["seq_mean_k3_above_delta_avg"]


def test_the_same_threshold_keeps_by_k2_what_it_rejects_by_abs_log_ratio() -> None:
    # GIVEN k2 = 0.05 exactly where abs(log_ratio) = sqrt(0.1)
    log_ratio = np.array([0.04, 0.3, -0.3, -0.4])
    batch = scores("sampled", **{f"seq_max_{name}": values for name, values in sampled_divergences(log_ratio).items()})
    assert decide(Criteria(delta_max=0.05, max_of="k2"), batch).keep.tolist() == [True, True, True, False]
    assert decide(Criteria(delta_max=0.05, max_of="abs-log-ratio"), batch).keep.tolist() == [True, False, False, False]
    assert decide(Criteria(delta_max=math.sqrt(0.1), max_of="abs-log-ratio"), batch).keep.tolist() == [True] * 3 + [
        False
    ]


def test_the_numbers_of_the_direction_table_decide_differently_by_k3_and_by_abs_log_ratio() -> None:
    # GIVEN rho = 0.01 and rho = 100: k3 is 3.615 and 94.39, abs(log rho) 4.605 for both
    both = sampled_divergences(np.log([0.01, 100.0]))
    batch = scores("sampled", **{f"seq_max_{name}": values for name, values in both.items()})
    assert decide(Criteria(delta_max=3.62, max_of="k3"), batch).keep.tolist() == [True, False]
    assert decide(Criteria(delta_max=94.4, max_of="k3"), batch).keep.tolist() == [True, True]
    assert decide(Criteria(delta_max=4.604, max_of="abs-log-ratio"), batch).keep.tolist() == [False, False]


# What is never kept


def test_a_row_without_policy_tokens_is_named_first_and_alone() -> None:
    batch = scores("exact", num_tokens=[0, 5], seq_max_kl=[NAN, 0.2], seq_argmax_kl=[-1, 4])
    assert reasons(Criteria(delta_max=0.05, keep="num_tokens >= 0"), batch) == [
        "no_policy_tokens",
        "seq_max_kl_above_delta_max(value=0.2, position=4, delta=0.05)",
    ]


def test_the_grade_of_a_row_without_policy_tokens_does_not_make_a_mixture() -> None:
    batch = scores(["exact", "sampled"], num_tokens=[5, 0], seq_max_kl=[0.01, NAN])
    assert reasons(Criteria(delta_max=0.05), batch) == [None, "no_policy_tokens"]


@pytest.mark.parametrize(
    "criteria",
    [
        Criteria(delta_max=0.05),
        Criteria(delta_avg=0.05, avg_of="k3"),
        Criteria(keep="seq_mean_k3 <= 1"),
        Criteria(keep="seq_max_kl == inf"),
        Criteria(keep="1 < 2"),
    ],
)
def test_infinite_kl_is_never_kept_whatever_the_criteria(criteria: Criteria) -> None:
    batch = scores("exact", seq_max_kl=[INF, INF], seq_mean_k3=[0, 0], seq_argmax_kl=[9, 0])
    assert reasons(criteria, batch) == ["seq_max_kl_infinite(position=9)", "seq_max_kl_infinite(position=0)"]


def test_an_infinite_lower_bound_is_infinite_kl_too() -> None:
    batch = scores("interval", seq_max_kl_lower=[INF, 0.0], seq_max_k2=[0.0, 0.0])
    assert reasons(Criteria(delta_max=0.05, max_of="k2"), batch) == ["seq_max_kl_infinite", None]


def test_nan_is_never_kept_and_its_column_is_named() -> None:
    sampled = scores("sampled", seq_max_k2=[NAN, 0.01], seq_mean_k3=[0.001, NAN])
    assert reasons(Criteria(delta_max=0.05, delta_avg=0.002), sampled) == [
        "not_a_number(column=seq_max_k2)",
        "not_a_number(column=seq_mean_k3)",
    ]
    exact = scores("exact", seq_max_kl=[NAN], seq_max_k2=[0.01])
    assert reasons(Criteria(delta_max=0.05, max_of="k2"), exact) == ["not_a_number(column=seq_max_kl)"]


def test_an_expression_keeps_only_what_is_true() -> None:
    batch = scores("sampled", reward=[1.0, 0.0, NAN], seq_mean_k3=[0.1, 0.1, 0.1])
    rejected = "keep_expression_false(reward=%s)"
    assert reasons(Criteria(keep="reward > 0"), batch) == [None, rejected % "0", "not_a_number(column=reward)"]
    assert reasons(Criteria(keep="not reward > 0"), batch) == [rejected % "1", None, "not_a_number(column=reward)"]
    assert reasons(Criteria(keep="reward > 0 or seq_mean_k3 < 1"), batch) == [None, None, None]
    assert reasons(Criteria(keep="log(-seq_mean_k3) < 0"), batch) == ["not_a_number"] * 3


def test_an_unknown_expression_names_the_first_column_that_is_missing() -> None:
    batch = scores("sampled", a=[NAN, NAN, 1.0], b=[NAN, 1.0, NAN])
    assert reasons(Criteria(keep="b < 2 and a < 2"), batch) == [
        "not_a_number(column=b)",
        "not_a_number(column=a)",
        "not_a_number(column=b)",
    ]


def test_an_expression_with_an_unknown_name_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="Did you mean reward"):
        decide(Criteria(keep="rewards > 0"), scores("sampled", reward=[1.0]))


# Intervals


def test_by_default_the_sampled_criteria_decide_on_intervals_and_a_lower_bound_vetoes() -> None:
    batch = scores(
        "interval",
        seq_max_k2=[0.01, 0.01, 0.2, 0.2],
        seq_max_kl_lower=[0.05, 0.08, 0.0, 0.08],
        seq_argmax_k2=[1, 1, 1, 1],
        seq_argmax_kl_lower=[2, 2, 2, 2],
    )
    veto = "veto_seq_max_kl_lower_above_delta_max(value=0.08, position=2, delta=0.05)"
    above = "seq_max_k2_above_delta_max(value=0.2, position=1, delta=0.05)"
    assert reasons(Criteria(delta_max=0.05), batch) == [None, veto, above, f"{above}; {veto}"]


def test_mean_and_sum_have_their_own_vetoes() -> None:
    columns = {"seq_max_kl_lower": [0.1], "seq_mean_kl_lower": [0.01], "seq_sum_kl_lower": [0.6]}
    batch = scores("interval", **columns, seq_mean_k3=[0.0], seq_sum_k3=[0.0])
    assert reasons(Criteria(delta_avg=0.002, delta_total=0.5), batch) == [
        "veto_seq_mean_kl_lower_above_delta_avg(value=0.01, delta=0.002); "
        "veto_seq_sum_kl_lower_above_delta_total(value=0.6, delta=0.5)"
    ]


def test_a_divergence_that_is_named_decides_without_veto() -> None:
    batch = scores("interval", seq_max_k2=[0.01], seq_max_kl_lower=[0.2])
    assert reasons(Criteria(delta_max=0.05, max_of="k2"), batch) == [None]


INTERVALS = {"seq_max_kl_lower": [0.0, 0.01, 0.05, 0.06], "seq_max_kl_upper": [0.05, 0.2, INF, 0.2]}


@pytest.mark.parametrize(("undecided", "kept"), [("mask", [0]), ("keep", [0, 1, 2])])
def test_an_interval_keeps_rejects_or_is_undecided(undecided: Literal["mask", "keep"], kept: list[int]) -> None:
    found = reasons(Criteria(delta_max=0.05, max_of="kl", undecided=undecided), scores("interval", **INTERVALS))
    assert [row for row, reason in enumerate(found) if reason is None] == kept
    assert found[3] == "seq_max_kl_lower_above_delta_max(value=0.06, delta=0.05)"
    if undecided == "mask":
        assert found[1:3] == [
            "undecided_seq_max_kl(lower=0.01, upper=0.2, delta=0.05)",
            "undecided_seq_max_kl(lower=0.05, upper=inf, delta=0.05)",
        ]


def test_an_undecided_row_can_be_an_error_that_names_it() -> None:
    criteria = Criteria(delta_max=0.05, max_of="kl", undecided="error")
    with pytest.raises(BadInput) as caught:
        decide(criteria, scores("interval", **INTERVALS), place=lambda row: f"shard, row {row + 100}")
    assert caught.value.place == "shard, row 101"
    assert "seq_max_kl(lower=0.01, upper=0.2, delta=0.05)" in caught.value.cause
    assert "--undecided mask or keep" in caught.value.next_step


def test_a_row_that_another_criterion_rejects_is_not_undecided() -> None:
    criteria = Criteria(delta_max=0.05, max_of="kl", delta_avg=0.002, avg_of="k3", undecided="error")
    batch = scores("interval", seq_max_kl_lower=[0.01], seq_max_kl_upper=[0.2], seq_mean_k3=[0.1])
    assert causes(str(reasons(criteria, batch)[0])) == ["undecided_seq_max_kl", "seq_mean_k3_above_delta_avg"]


def test_a_bound_that_is_nan_decides_nothing_even_where_undecided_rows_are_kept() -> None:
    batch = scores("interval", seq_max_kl_lower=[0.0], seq_mean_tv_lower=[0.0], seq_mean_tv_upper=[NAN])
    criteria = Criteria(delta_avg=0.05, avg_of="tv", undecided="keep")
    assert reasons(criteria, batch) == ["not_a_number(column=seq_mean_tv_upper)"]


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_an_interval_that_contains_the_truth_never_contradicts_it(
    truth: float, below: float, above: float, delta: float
) -> None:
    lower, upper = truth * below, truth + above
    interval = scores("interval", seq_max_kl_lower=[lower], seq_max_kl_upper=[upper])
    exact = decide(Criteria(delta_max=delta), scores("exact", seq_max_kl=[truth]))
    cautious, lenient = (
        decide(Criteria(delta_max=delta, max_of="kl", undecided=undecided), interval) for undecided in ("mask", "keep")
    )
    assert cautious.keep[0] <= exact.keep[0] <= lenient.keep[0]


# Mixtures


def test_each_row_of_a_mixture_is_judged_by_what_its_grade_knows() -> None:
    batch = scores(
        ["exact", "interval", "exact", "interval"],
        seq_max_kl=[0.04, NAN, 0.06, NAN],
        seq_max_kl_lower=[NAN, 0.06, NAN, 0.01],
        seq_max_kl_upper=[NAN, 0.09, NAN, 0.04],
    )
    found = reasons(Criteria(delta_max=0.05, max_of="kl"), batch)
    assert [reason and causes(reason)[0] for reason in found] == [
        None,
        "seq_max_kl_lower_above_delta_max",
        "seq_max_kl_above_delta_max",
        None,
    ]


def test_a_mixture_that_does_not_name_its_divergence_is_a_usage_error() -> None:
    batch = scores(["exact", "sampled"], seq_max_kl=[0.01, NAN], seq_max_k2=[0.01, 0.01])
    with pytest.raises(UsageError, match="--max-of"):
        decide(Criteria(delta_max=0.05), batch)
    assert reasons(Criteria(delta_max=0.05, max_of="k2"), batch) == [None, None]


def test_criteria_resolved_for_the_first_batch_refuse_a_later_batch_of_another_grade() -> None:
    resolved = resolve(Criteria(delta_max=0.05), ["sampled"])
    assert reasons(resolved, scores("sampled", seq_max_k2=[0.01])) == [None]
    with pytest.raises(UsageError, match="exact, sampled"):
        decide(resolved, scores("exact", seq_max_kl=[0.01], seq_max_k2=[0.01]))


def test_a_batch_of_no_rows_has_no_verdicts() -> None:
    batch = {name: values[:0] for name, values in scores("exact", seq_max_kl=[0.01]).items()}
    assert reasons(Criteria(delta_max=0.05, keep="1 < 2"), batch) == []


def test_a_missing_column_and_an_unknown_grade_are_bad_input() -> None:
    with pytest.raises(BadInput, match="seq_max_k2"):
        decide(Criteria(delta_max=0.05), scores("sampled", seq_mean_k3=[0.1]))
    with pytest.raises(BadInput, match="guessed"):
        decide(Criteria(delta_max=0.05), scores("guessed", seq_max_k2=[0.1]))


# Against other code

cells = st.sampled_from([NAN, 0.0, 0.01, 0.05, 0.2, INF])
rows_of_scores = st.fixed_dictionaries(
    {
        "num_tokens": st.integers(0, 2),
        **dict.fromkeys(["seq_max_kl", "seq_mean_kl", "seq_max_k2", "seq_mean_k3", "seq_sum_k3", "reward"], cells),
    }
)


def kept_by_hand(row: dict[str, float], grade: str) -> bool:
    """max of k2 at most 0.05, mean of the grade's own at most 0.01, reward above 0: in plain Python."""
    mean = row["seq_mean_kl"] if grade == "exact" else row["seq_mean_k3"]
    finite = grade != "exact" or row["seq_max_kl"] < INF
    return row["num_tokens"] > 0 and finite and row["seq_max_k2"] <= 0.05 and mean <= 0.01 and row["reward"] > 0


@given(st.lists(rows_of_scores, min_size=1, max_size=8), st.sampled_from(["exact", "sampled"]))
def test_masks_equal_those_of_a_plain_loop(rows: list[dict[str, float]], grade: str) -> None:
    batch = scores(grade, **{name: [row[name] for row in rows] for name in rows[0]})
    criteria = Criteria(delta_max=0.05, max_of="k2", delta_avg=0.01, keep="reward > 0")
    assert [reason is None for reason in reasons(criteria, batch)] == [kept_by_hand(row, grade) for row in rows]


@given(st.lists(rows_of_scores, min_size=1, max_size=8), st.data())
def test_a_verdict_does_not_depend_on_the_other_rows(rows: list[dict[str, float]], data: st.DataObject) -> None:
    batch = scores("sampled", **{name: [row[name] for row in rows] for name in rows[0]})
    criteria = Criteria(delta_max=0.05, delta_total=0.01, keep="reward > 0 or seq_mean_k3 == 0")
    order = np.array(data.draw(st.permutations(range(len(rows)))))
    shuffled = {name: values[order] for name, values in batch.items()}
    assert reasons(criteria, shuffled) == [reasons(criteria, batch)[row] for row in order]


VERL_OPTIONS = {
    "seq_max_k2 @ 0.05": Criteria(delta_max=0.05, max_of="k2"),
    "seq_max_k2 @ 0.02": Criteria(delta_max=0.02, max_of="k2"),
    "seq_mean_k3 @ 0.002": Criteria(delta_avg=0.002, avg_of="k3"),
    "seq_mean_k3 @ 0.004": Criteria(delta_avg=0.004),
    "seq_max_k2,seq_mean_k3 @ 0.05,0.004": Criteria(delta_max=0.05, delta_avg=0.004),
    "seq_max_k3 @ 0.05": Criteria(delta_max=0.05, max_of="k3"),
    "seq_sum_k3 @ 0.5": Criteria(delta_total=0.5, total_of="k3"),
    "seq_mean_k1 @ 0.99_1.01": Criteria(keep="0.99 <= exp(seq_mean_log_ratio) <= 1.01"),
    "seq_sum_k1 @ 0.5_2.0": Criteria(keep="0.5 <= exp(seq_sum_log_ratio) <= 2.0"),
    "seq_mean_k2 @ 0.003": Criteria(delta_avg=0.003, avg_of="k2"),
}


@pytest.fixture(scope="module")
def real_scores() -> dict[str, np.ndarray[Any, Any]]:
    """Sequence scores of 48 real rollouts, at grade `sampled`."""
    log_ratio = pq.read_table(VERL)["log_ratio"].combine_chunks()
    offsets = log_ratio.offsets.to_numpy().astype(np.int64)
    flat = log_ratio.flatten().to_numpy()
    columns: dict[str, Any] = {"num_tokens": np.diff(offsets)}
    for name, values in sampled_divergences(flat).items():
        found = sequence_statistics(values, offsets, np.ones(len(flat), dtype=bool))
        columns |= {f"seq_max_{name}": found.max, f"seq_mean_{name}": found.mean, f"seq_sum_{name}": found.sum}
        columns[f"seq_argmax_{name}"] = found.argmax
    return scores("sampled", **columns)


def test_every_option_of_the_file_has_its_criteria() -> None:
    assert set(pq.read_schema(VERL).names) - {"rollout_id", "log_ratio"} == set(VERL_OPTIONS)


@pytest.mark.parametrize("option", VERL_OPTIONS)
def test_masks_equal_those_of_verl_on_real_rollouts(option: str, real_scores: dict[str, np.ndarray[Any, Any]]) -> None:
    criteria = VERL_OPTIONS[option]
    needed = {name: real_scores[name] for name in needed_columns(criteria, ["sampled"], real_scores)}
    found: Verdicts = decide(criteria, needed)
    expected = pq.read_table(VERL, columns=[option])[option].to_pylist()
    assert 0 < sum(expected) < len(expected)
    assert found.keep.tolist() == expected
