"""What a threshold would keep, in tables, curves and targets, is what a loop over the rows counts."""

from __future__ import annotations

import itertools
import math
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_rows import Row, random_rows, score_batch, token_values

from trm_audit.errors import UsageError
from trm_audit.numerics.histogram import RELATIVE_ERROR
from trm_audit.report.blocks import DeltaRow, DeltaTable
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.deltas import DELTAS, FINE_DELTAS, MARKED, MOST_ROWS, DeltaTotals
from trm_audit.report.summary import Thresholds

GRADES = ("exact", "sketch", "interval", "sampled")
KL = ("kl", "kl_estimate", "kl_lower", "kl_upper")
STATISTIC = {"max": max, "sum": math.fsum, "mean": lambda values: math.fsum(values) / len(values)}


def rows_with_rewards(seed: int = 0, count: int = 60) -> list[Row]:
    """Rows of all grades, mixed; rewards of 0, 1, -0.5 and none."""
    rng = np.random.default_rng(seed)
    rows = [row for grade in GRADES for row in random_rows(rng, count, grade)]
    for row in rows:
        row["reward"] = [None, 0.0, 1.0, -0.5][int(rng.integers(4))]
    return [rows[i] for i in rng.permutation(len(rows))]


def totals(*batches: pa.RecordBatch, thresholds: Thresholds | None = None) -> DeltaTotals:
    out = DeltaTotals(thresholds or Thresholds())
    for batch in batches:
        out.add(ScoreBatch(batch), None)
    return out


def of_values(values: list[float | None], name: str = "seq_max_kl", **columns: Any) -> pa.RecordBatch:
    """Rows with one statistic; without policy tokens where it is None."""
    given = {name: pa.array(values, pa.float64()), "num_tokens": [0 if v is None else 3 for v in values]}
    return pa.RecordBatch.from_pydict(given | columns)


def statistic(row: Row, name: str) -> float:
    """`seq_kind_divergence` of a row, NaN where it has none."""
    _, kind, divergence = name.split("_", 2)
    values = token_values(row, divergence)
    return STATISTIC[kind](values) if values else math.nan


def num_tokens(row: Row) -> int:
    return sum(row["response_mask"])


def looped(rows: list[Row], name: str, delta: float) -> DeltaRow:
    """The row of a table, by a loop."""
    members = [row for row in rows if not math.isnan(statistic(row, name)) or num_tokens(row) == 0]
    kept = [row for row in members if statistic(row, name) <= delta]
    rewards = [row["reward"] for row in kept if row["reward"] is not None]
    correct = [row for row in members if (row["reward"] or 0) > 0]
    kept_correct = sum(row in kept for row in correct)
    return DeltaRow(
        delta=delta,
        num_kept=len(kept),
        share_kept=len(kept) / len(members),
        share_tokens_kept=sum(map(num_tokens, kept)) / sum(map(num_tokens, members)),
        num_kept_correct=kept_correct,
        num_rejected_correct=len(correct) - kept_correct,
        mean_reward_kept=math.fsum(rewards) / len(rewards) if rewards else None,
    )


MAIN = [
    *(f"seq_{kind}_{d}" for d in ("kl", "kl_lower", "k2", "k3") for kind in STATISTIC),
    "seq_max_tv",
    "seq_mean_kl_upper",
    "seq_sum_abs_log_ratio",
]


@pytest.mark.parametrize("name", MAIN)
def test_every_row_of_a_table_equals_a_loop_over_the_rows(name: str) -> None:
    rows = rows_with_rewards()
    table = totals(score_batch(rows)).tables()[name]
    empty = sum(num_tokens(row) == 0 for row in rows)
    assert table.n == sum(not math.isnan(statistic(row, name)) for row in rows) + empty
    assert empty > 0
    assert len(table.rows) > 3
    assert table.rows == [looped(rows, name, row.delta) for row in table.rows]


def test_curves_equal_a_loop_over_the_rows_at_every_delta() -> None:
    rows = rows_with_rewards()
    curves = totals(score_batch(rows)).curves()
    empty = sum(num_tokens(row) == 0 for row in rows)
    assert curves.deltas == DELTAS.tolist()
    assert {"seq_max_kl_reverse", "seq_mean_tv", "seq_sum_tv_upper"} <= set(curves.curves)
    assert not any(name.endswith(("_log_ratio", "_k1", "_ratio")) and "abs" not in name for name in curves.curves)
    for name, curve in curves.curves.items():
        values = [value for row in rows if not math.isnan(value := statistic(row, name))]
        assert curve.n == len(values) + empty
        assert curve.share == [sum(value <= delta for value in values) / curve.n for delta in DELTAS]


def said(found: DeltaTotals) -> tuple[object, ...]:
    """Everything; sums of the rewards 0, 1 and -0.5 have no rounding."""
    return found.curves(), found.tables(), found.targets(0.7)


@pytest.mark.parametrize("thresholds", [Thresholds(), Thresholds(0.0123, "k2", 0.002, "kl")], ids=["none", "given"])
def test_neither_batches_nor_halves_nor_order_matter(thresholds: Thresholds) -> None:
    # GIVEN rows of which the first have no kl, so that one half lacks statistics that the other has
    rows = sorted(rows_with_rewards(), key=lambda row: row["grade"] == "exact")
    batch = score_batch(rows)
    whole = said(totals(batch, thresholds=thresholds))
    # WHEN they come in batches of uneven size, one of them empty
    parts = [batch.slice(a, b - a) for a, b in itertools.pairwise((0, 1, 18, 18, 70, 120, 240))]
    assert said(totals(*parts, thresholds=thresholds)) == whole
    # THEN nothing changes, nor by adding totals of their own in any order
    separate = [totals(part, thresholds=thresholds) for part in parts]
    assert said(reduce(add, separate)) == said(reduce(add, separate[::-1])) == whole


def test_totals_with_different_thresholds_cannot_be_added() -> None:
    with pytest.raises(UsageError, match="different thresholds"):
        DeltaTotals(Thresholds(0.1)) + DeltaTotals(Thresholds(0.2))


def test_equality_is_kept_at_a_threshold_that_is_on_no_grid() -> None:
    values = [0.0123, math.nextafter(0.0123, 0), math.nextafter(0.0123, 1), 5.0]
    batch = of_values([*values], reward=[1.0, 0.0, 1.0, 0.0])
    table = totals(batch, thresholds=Thresholds(0.0123, "kl")).tables()["seq_max_kl"]
    (row,) = [row for row in table.rows if row.delta == 0.0123]
    assert (row.num_kept, row.share_tokens_kept, row.num_kept_correct, row.mean_reward_kept) == (2, 0.5, 1, 0.5)


def test_the_papers_thresholds_are_rows_where_it_has_some_and_the_users_where_theirs_are() -> None:
    given = Thresholds(0.0123, "k2", 3e-7, "kl", 70.0, "k3")
    tables = totals(score_batch(rows_with_rewards()), thresholds=given).tables()
    for name, table in tables.items():
        deltas = [row.delta for row in table.rows]
        assert table.marked == MARKED.get(name, [])
        assert set(table.marked) <= set(deltas)
        assert deltas == sorted(set(deltas))
    assert {"seq_max_kl", "seq_max_kl_estimate", "seq_max_k2", "seq_mean_kl", "seq_mean_k3"} <= {
        n for n, t in tables.items() if t.marked
    }
    assert not {"seq_max_tv", "seq_max_k3", "seq_sum_kl"} & {n for n, t in tables.items() if t.marked}
    own = {name for name, table in tables.items() if {0.0123, 3e-7, 70.0} & {row.delta for row in table.rows}}
    assert own == {"seq_max_k2", "seq_sum_k3", *(f"seq_mean_{name}" for name in KL)}


def test_a_threshold_without_a_divergence_belongs_to_kl_and_to_the_sampled_default() -> None:
    tables = totals(score_batch(rows_with_rewards()), thresholds=Thresholds(0.0123, None, 0.0077)).tables()
    with_max = {name for name, table in tables.items() if 0.0123 in {row.delta for row in table.rows}}
    with_mean = {name for name, table in tables.items() if 0.0077 in {row.delta for row in table.rows}}
    assert with_max == {"seq_max_k2", *(f"seq_max_{name}" for name in KL)}
    assert with_mean == {"seq_mean_k3", *(f"seq_mean_{name}" for name in KL)}


def test_only_the_main_statistics_have_tables_unless_a_criterion_is_on_another() -> None:
    batch = score_batch(rows_with_rewards())
    tables = totals(batch).tables()
    assert not {"seq_mean_tv", "seq_max_kl_reverse"} & set(tables)
    # the certified TV is what a sketch is best at
    assert {"seq_max_tv", "seq_max_tv_lower", "seq_max_tv_upper"} <= set(tables)
    given = Thresholds(delta_max=0.03, max_of="kl_reverse", delta_avg=0.03, avg_of="tv")
    assert {"seq_mean_tv", "seq_max_kl_reverse"} <= set(totals(batch, thresholds=given).tables())


def table_of(values: list[float | None]) -> DeltaTable:
    return totals(of_values(values, "seq_sum_kl")).tables()["seq_sum_kl"]


def test_a_table_starts_where_nothing_is_kept_and_ends_where_no_more_is() -> None:
    assert [row.delta for row in table_of([0.003, 0.004, 0.03]).rows] == [0.002, 0.005, 0.01, 0.02, 0.05]
    assert [row.delta for row in table_of([0.003, math.inf]).rows] == [0.002, 0.005]
    assert [row.delta for row in table_of([0.0, 0.0]).rows] == [1e-6]
    assert [(row.delta, row.num_kept) for row in table_of([math.inf, None]).rows] == [(1e4, 0)]


def test_of_many_thresholds_those_are_shown_between_which_acceptance_moves() -> None:
    # GIVEN values over ten decades, nine in ten of them between 1e-3 and 1e-2
    rng = np.random.default_rng(3)
    wide, narrow = 10 ** rng.uniform(-6, 4, 200), 10 ** rng.uniform(-3, -2, 1800)
    table = table_of([*wide.tolist(), *narrow.tolist()])
    # THEN the decade with most of them is complete, and the ends are there
    deltas = [row.delta for row in table.rows]
    assert len(deltas) == MOST_ROWS
    assert {1e-6, 0.001, 0.002, 0.005, 0.01, 1e4} <= set(deltas)


def test_without_rewards_nothing_is_said_of_correct_answers() -> None:
    batch = score_batch(rows_with_rewards(), without=["reward"])
    for row in totals(batch).tables()["seq_max_kl"].rows:
        assert (row.num_kept_correct, row.num_rejected_correct, row.mean_reward_kept) == (None, None, None)


def test_a_correct_answer_without_policy_tokens_is_rejected() -> None:
    rows = totals(of_values([0.01, None], reward=[0.0, 1.0])).tables()["seq_max_kl"].rows
    assert [(row.num_kept_correct, row.num_rejected_correct) for row in rows] == [(0, 1)] * len(rows)


def test_infinite_rewards_and_unknown_lengths_do_not_spoil_the_counts() -> None:
    batch = of_values([0.01, 0.02, 0.2], reward=[math.inf, -math.inf, 1.0])
    summed = totals(batch, batch) + totals(batch)
    assert [row.num_kept for row in summed.tables()["seq_max_kl"].rows][-1] == 9
    no_lengths = totals(batch.select(["seq_max_kl"])).tables()["seq_max_kl"]
    assert (no_lengths.n, no_lengths.num_tokens) == (3, 0)
    assert math.isnan(no_lengths.rows[0].share_tokens_kept)


def test_of_nothing_there_are_no_tables_no_curves_and_no_targets() -> None:
    for nothing in (totals(), totals(pa.RecordBatch.from_pydict({"rollout_id": ["a"]})), totals(of_values([None]))):
        assert nothing.tables() == {}
        assert nothing.targets(0.9) == []
        assert (nothing.curves().deltas, nothing.curves().curves) == ([], {})


NUMBERS = st.one_of(
    st.sampled_from([0.0, 0.05, 1e-300, 2e-18, 1e17, 5e18, math.inf]), st.floats(1e-12, 1e12), st.just(None)
)


@given(st.lists(NUMBERS, min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_a_target_is_the_smallest_threshold_of_the_grid_that_keeps_enough(
    values: list[float | None], wanted: float
) -> None:
    found = totals(of_values(values)).targets(wanted)
    if all(value is None for value in values):
        assert found == []
        return
    shares = {
        delta: sum(value is not None and value <= delta for value in values) / len(values)
        for delta in sorted({*FINE_DELTAS[np.searchsorted(FINE_DELTAS, [v for v in values if v and v < 1e308])], 0.0})
    }
    enough = [delta for delta, share in shares.items() if share >= wanted]
    (target,) = found
    assert (target.delta, target.share_kept) == ((enough[0], shares[enough[0]]) if enough else (None, None))


def test_a_share_that_the_data_hit_exactly_is_met_without_one_more() -> None:
    # 0.07 * 100 is 7.000000000000001 in float64, and nextafter(0.29, 1) * 100 is 29
    values = [float(f"{n}e-3") for n in range(1, 101)]
    found = totals(of_values([*values]))
    for num in range(1, 101):
        (target,) = found.targets(num / 100)
        assert (target.delta, target.share_kept) == (values[num - 1], num / 100)
    for num in range(1, 100):
        (target,) = found.targets(math.nextafter(num / 100, 1))
        assert (target.delta, target.share_kept) == (values[num], (num + 1) / 100)


def test_targets_lie_within_the_promised_error_above_the_smallest_possible_threshold() -> None:
    values = np.random.default_rng(5).lognormal(-6, 3, 4000)
    (target,) = totals(of_values(values.tolist())).targets(0.9)
    smallest = np.sort(values)[3599]
    assert target.delta is not None
    assert smallest <= target.delta <= smallest * (1 + RELATIVE_ERROR)


def test_targets_are_short_enough_to_be_typed_and_closer_together_than_they_claim() -> None:
    assert all(float(f"{delta:.4g}") == delta for delta in FINE_DELTAS)
    inside = FINE_DELTAS[(FINE_DELTAS >= 1e-18) & (FINE_DELTAS <= 1e18)]
    assert (inside[1:] / inside[:-1] < 1 + RELATIVE_ERROR).all()
    assert np.isin(DELTAS, FINE_DELTAS).all()


def test_zeros_alone_need_no_threshold_and_infinities_have_none() -> None:
    assert [t.delta for t in totals(of_values([0.0, 0.0, 0.3])).targets(0.6)] == [0.0]
    assert [(t.delta, t.share_kept) for t in totals(of_values([0.1, math.inf])).targets(0.6)] == [(None, None)]
    assert [t.delta for t in totals(of_values([0.1, None])).targets(0.6)] == [None]


@pytest.mark.parametrize("wanted", [0.0, -0.1, 1.1, math.nan], ids=str)
def test_a_target_that_is_no_share_is_refused(wanted: float) -> None:
    with pytest.raises(UsageError, match="no share"):
        DeltaTotals().targets(wanted)
