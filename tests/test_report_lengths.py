"""Acceptance by length equals a loop over the rows, and shows what length does to max, mean and total criteria."""

from __future__ import annotations

import itertools
import math
from functools import reduce
from operator import add

import numpy as np
import pyarrow as pa
import pytest
from report_rows import Row, random_rows, score_batch, token_values

from trm_audit.report.blocks import AcceptanceByLength
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.lengths import LengthTotals
from trm_audit.report.summary import Thresholds

STATISTIC = {"max": max, "sum": math.fsum, "mean": lambda values: math.fsum(values) / len(values)}


def totals(*batches: pa.RecordBatch, thresholds: Thresholds | None = None) -> LengthTotals:
    out = LengthTotals(thresholds or Thresholds())
    for batch in batches:
        out.add(ScoreBatch(batch), None)
    return out


def by_length(batch: pa.RecordBatch, thresholds: Thresholds | None = None) -> AcceptanceByLength:
    found = totals(batch, thresholds=thresholds).finish()
    assert found is not None
    return found


def some_rows(grade: str = "exact", count: int = 150) -> list[Row]:
    return random_rows(np.random.default_rng(1), count, grade)


def looped(rows: list[Row], name: str, delta: float, low: int, high: int) -> tuple[int, float | None]:
    """Sequences of low <= length < high with the statistic, and the share of them that delta keeps."""
    _, kind, divergence = name.split("_", 2)
    lists = [token_values(row, divergence) or [] for row in rows]
    values = [STATISTIC[kind](found) for found in lists if low <= len(found) < high and found]
    return len(values), sum(value <= delta for value in values) / len(values) if values else None


@pytest.mark.parametrize("grade", ["exact", "sketch", "interval", "sampled"])
def test_every_bin_of_every_curve_equals_a_loop_over_the_rows(grade: str) -> None:
    rows = some_rows(grade)
    found = by_length(score_batch(rows))
    assert found.edges == [1, 2, 4, 8, 16]
    for curve in found.curves:
        expected = [looped(rows, curve.statistic, curve.delta, *bin) for bin in itertools.pairwise(found.edges)]
        assert found.n == [n for n, _ in expected]
        assert curve.share_kept == [share for _, share in expected]
    divergences = [curve.statistic for curve in found.curves]
    whole = {"exact": "kl", "sketch": "kl_estimate"}.get(grade)
    names = (whole, whole, whole) if whole else ("k2", "k3", "k3")
    assert divergences == [f"seq_{kind}_{name}" for kind, name in zip(("max", "mean", "sum"), names, strict=True)]


def test_a_length_that_no_sequence_has_is_unknown_not_zero() -> None:
    rows = [row for row in some_rows() if not 2 <= sum(row["response_mask"]) < 4]
    found = by_length(score_batch(rows))
    assert found.n[1] == 0
    assert [curve.share_kept[1] for curve in found.curves] == [None, None, None]


def test_neither_batches_nor_halves_matter() -> None:
    rows = [*some_rows("sampled", 60), *some_rows("exact", 60)]
    batch, thresholds = score_batch(rows), Thresholds(delta_max=0.0123, max_of="k2")
    whole = totals(batch, thresholds=thresholds).finish()
    parts = [batch.slice(a, b - a) for a, b in itertools.pairwise((0, 1, 40, 40, 90, 120))]
    assert totals(*parts, thresholds=thresholds).finish() == whole
    separate = [totals(part, thresholds=thresholds) for part in parts]
    assert reduce(add, separate).finish() == reduce(add, separate[::-1]).finish() == whole


def test_the_threshold_that_was_given_is_the_one_shown_and_the_others_keep_about_as_much() -> None:
    rows = some_rows(count=400)
    found = by_length(score_batch(rows), Thresholds(delta_max=0.0123, max_of="tv"))
    assert [(curve.statistic, curve.delta) for curve in found.curves[:1]] == [("seq_max_tv", 0.0123)]
    kept = [np.dot([share or 0.0 for share in curve.share_kept], found.n) / sum(found.n) for curve in found.curves]
    assert max(kept) - min(kept) < 0.02


def test_a_divergence_that_the_data_lack_gives_way_to_the_sampled_default() -> None:
    found = by_length(score_batch(some_rows("interval")), Thresholds(delta_max=0.0123, max_of="kl"))
    assert [curve.statistic for curve in found.curves] == ["seq_max_k2", "seq_mean_k3", "seq_sum_k3"]
    assert found.curves[0].delta != 0.0123


def test_of_mixed_grades_the_divergence_that_all_have_is_shown() -> None:
    rows = [*some_rows("sampled"), *some_rows("exact")]
    found = by_length(score_batch(rows))
    assert found.curves[0].statistic == "seq_max_k2"
    assert sum(found.n) == sum(bool(token_values(row, "k2")) for row in rows)


def independent_tokens(rng: np.random.Generator, lengths: list[int], count: int) -> pa.RecordBatch:
    """Sequences whose tokens all draw their kl from one law, with a long tail."""
    kl = [rng.lognormal(-7, 1, length) for length in lengths for _ in range(count)]
    columns = {f"seq_{kind}_kl": [float(getattr(values, kind)()) for values in kl] for kind in STATISTIC}
    return pa.RecordBatch.from_pydict({"num_tokens": [len(values) for values in kl], **columns})


def test_where_tokens_are_alike_length_leaves_the_mean_bends_the_max_and_ends_the_total() -> None:
    batch = independent_tokens(np.random.default_rng(2), [64, 128, 256, 512, 1024], 400)
    largest, mean, total = (np.array(curve.share_kept, dtype=float) for curve in by_length(batch).curves)
    # the total keeps all of the short ones and none of the long ones
    assert (total[0], total[-1]) == (1, 0)
    # the max rejects more of the long ones, and keeps some of each
    assert (np.diff(largest) < 0).all()
    assert largest[-1] > 0.1
    # the mean rejects no more of the long ones
    assert np.ptp(total) > np.ptp(largest) > 0.3
    assert mean[-1] > mean[0]


def test_infinities_are_never_kept_and_do_not_warn() -> None:
    columns = {f"seq_{kind}_kl": [0.1, math.inf, math.inf, None] for kind in STATISTIC}
    found = by_length(pa.RecordBatch.from_pydict({"num_tokens": [3, 2, 3, 0], **columns}))
    assert found.n == [3]
    assert [curve.share_kept for curve in found.curves] == [[1 / 3]] * 3


@pytest.mark.parametrize("name", ["num_tokens", "seq_max_kl"])
def test_without_lengths_or_statistics_there_is_nothing_to_show(name: str) -> None:
    batch = score_batch(some_rows())
    assert totals(batch.select([name])).finish() is None
    assert totals().finish() is None
    assert totals(batch.slice(0, 0)).finish() is None
    assert totals(score_batch([row for row in some_rows() if not any(row["response_mask"])])).finish() is None
