"""Bounds as functions of the horizon: each point is that of responses cut there, the last one is the bounds block."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import reduce

import numpy as np
import pyarrow as pa
import pytest
from report_rows import Row, random_rows, score_batch, token_values

from trm_audit.numerics.bounds import BOUNDS, error_bounds
from trm_audit.report.blocks import BoundCurves
from trm_audit.report.bound_blocks import bound_blocks
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.horizons import bound_curves, horizons_up_to
from trm_audit.report.summary import Counts
from trm_audit.report.totals import EVIDENCE, DivergenceTotals, evidence_rows, merged

Totals = dict[tuple[str, str], DivergenceTotals]

GRADES = ("exact", "sketch", "interval", "sampled")
TV_TOKEN = {"exact": "tv", "sketch": "tv_upper", "interval": "tv_upper", "sampled": "ratio"}
TV_MAX = {"exact": "tv", "sketch": "tv_upper", "interval": "tv_upper", "sampled": None}
KL_MAX = {"exact": "kl", "sketch": "kl_upper", "interval": "kl_upper", "sampled": "k2"}
KL_SEQ = {"exact": "kl", "sketch": "kl_upper", "interval": "kl_upper", "sampled": "k3"}
SUFFIX = {"exact": "", "sketch": "_upper", "interval": "_upper", "sampled": "_estimate"}


def mixed_rows(count: int = 40) -> list[Row]:
    rng = np.random.default_rng(0)
    rows = [row for grade in GRADES for row in random_rows(rng, count, grade)]
    return [rows[i] for i in rng.permutation(len(rows))]


def evidence(*batches: pa.RecordBatch) -> Totals:
    """What the report keeps of all rows."""
    out: Totals = {}
    for record_batch in batches:
        batch = ScoreBatch(record_batch)
        for name, columns in EVIDENCE.items():
            members = evidence_rows(batch, name)
            if members.any():
                out.setdefault(("all", name), DivergenceTotals()).add(batch, columns, members)
    return out


def counts(n_total: int, horizon: int | None) -> Counts:
    empty = {field.name: 0 for field in dataclasses.fields(Counts)}
    return Counts(**(empty | {"grades": {}, "audited_policies": {}, "n_total": n_total, "horizon": horizon}))


def curves(rows: list[Row], horizon: int | None, reward_range: float = 1.0) -> dict[str, BoundCurves]:
    return bound_curves(evidence(score_batch(rows)), counts(len(rows), horizon), reward_range)


def lists_of(rows: list[Row], grade: str, name: str) -> list[list[float]]:
    """A per-token quantity of the rows with one kind of evidence, those without policy tokens included."""
    members = rows if grade == "sampled" else [row for row in rows if row["grade"] == grade]
    return [token_values(row, name) or [] for row in members]


@pytest.mark.parametrize("grade", GRADES)
def test_every_point_is_the_bound_of_responses_that_end_there(grade: str) -> None:
    # GIVEN rows of up to 11 policy tokens and a horizon of 50
    rows = mixed_rows()
    found = curves(rows, 50)[grade]
    kl_max, kl_seq = (lists_of(rows, grade, names[grade]) for names in (KL_MAX, KL_SEQ))
    tv_max = lists_of(rows, grade, TV_MAX[grade] or "")
    tv = lists_of(rows, grade, TV_TOKEN[grade])
    if grade == "sampled":
        tv = [[abs(ratio - 1) / 2 for ratio in values] for values in tv]
    longest = max(map(len, kl_seq))
    assert longest < 16
    assert found.horizons == [1, 2, 4, 8, 16, 32, 50]
    for at, cut in enumerate(found.horizons):
        # WHEN they are cut: maxima stay what they are, D_seq and Dbar_t end at the cut
        expected = error_bounds(
            cut,
            kl_max=max(map(max, filter(None, kl_max))),
            kl_seq=sum(math.fsum(values[:cut]) for values in kl_seq) / len(kl_seq),
            tv_max=max(map(max, filter(None, tv_max)), default=None),
            tv_by_position=np.array([sum(v[t] for v in tv if len(v) > t) / len(tv) for t in range(min(cut, longest))]),
        )
        # THEN the curve goes through the bounds, in both constants
        for name in BOUNDS:
            pair = expected.bounds[name]
            assert found.published[name + SUFFIX[grade]][at] == pytest.approx(pair.published, rel=1e-12)
            assert found.sharp[name + SUFFIX[grade]][at] == pytest.approx(pair.sharp, rel=1e-12)


@pytest.mark.parametrize("horizon", [12, 16, 4096])
def test_the_last_point_is_the_bounds_block(horizon: int) -> None:
    rows = mixed_rows()
    totals, data = evidence(score_batch(rows)), counts(len(rows), horizon)
    blocks = bound_blocks(totals, data, 0.7, None)["all"]
    found = bound_curves(totals, data, 0.7)
    assert [*found] == [*blocks] == list(GRADES)
    for name, block in blocks.items():
        assert found[name].horizons[-1] == block.horizon
        assert [*found[name].published] == [*found[name].sharp] == [*block.bounds]
        for bound, pair in block.bounds.items():
            assert (found[name].published[bound][-1], found[name].sharp[bound][-1]) == (pair.published, pair.sharp)


@pytest.mark.parametrize("horizon", [5, 8, 64])
def test_the_last_point_takes_the_stored_sum_from_which_tokens_differ_by_rounding(horizon: int) -> None:
    batch = score_batch([{"grade": "exact", "log_ratio": [0.1] * 5, "kl": [1e-3] * 5, "tv": [0.01] * 5}])
    at = batch.schema.get_field_index("seq_sum_kl")
    batch = batch.set_column(at, "seq_sum_kl", pa.array([5e-3 * (1 - 1e-7)]))
    totals, data = evidence(batch), counts(1, horizon)
    mixed = bound_curves(totals, data, 1.0)["exact"].published["mixed_bound"]
    assert mixed[-1] == bound_blocks(totals, data, 1.0, None)["all"]["exact"].bounds["mixed_bound"].published
    assert mixed == sorted(mixed)


def test_horizons_double_and_end_at_the_last() -> None:
    assert [horizons_up_to(last) for last in (1, 2, 3, 4, 5)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 5]]


def test_evidence_whose_rows_lack_per_token_values_has_no_curve() -> None:
    rows = mixed_rows()
    # GIVEN no list of the exact KL, and one row without its list of log ratios
    batch = score_batch(rows, without=["kl"])
    found = bound_curves(evidence(batch), counts(len(rows), 50), 1.0)
    assert [*found] == ["sketch", "interval", "sampled"]
    lists = batch.column("log_ratio").to_pylist()
    lists[next(at for at, row in enumerate(rows) if any(row["response_mask"]))] = None
    at = batch.schema.get_field_index("log_ratio")
    holed = batch.set_column(at, "log_ratio", pa.array(lists, pa.list_(pa.float64())))
    assert [*bound_curves(evidence(holed), counts(len(rows), 50), 1.0)] == ["sketch", "interval"]


def test_without_tv_by_position_curve_and_block_take_eps_everywhere() -> None:
    rows = mixed_rows()
    totals, data = evidence(score_batch(rows, without=["tv"])), counts(len(rows), 50)
    block, found = bound_blocks(totals, data, 1.0, None)["all"]["exact"], bound_curves(totals, data, 1.0)["exact"]
    assert block.inputs["mean_seq_sum_tv"] is None
    assert {name: pair.published for name, pair in block.bounds.items()} == {
        name: values[-1] for name, values in found.published.items()
    }


def test_nothing_is_said_of_kept_rows_without_a_horizon_or_of_nothing() -> None:
    rows = mixed_rows()
    totals = evidence(score_batch(rows))
    kept = {("kept", name): found for (_, name), found in totals.items()}
    assert bound_curves(kept, counts(len(rows), 50), 1.0) == {}
    assert bound_curves(totals, counts(len(rows), None), 1.0) == {}
    assert bound_curves({}, counts(0, 50), 1.0) == {}
    empty = [row for row in rows if not any(row["response_mask"])]
    assert bound_curves(evidence(score_batch(empty)), counts(len(empty), 50), 1.0) == {}


def test_an_infinite_divergence_makes_bounds_infinite_or_capped_and_does_not_warn() -> None:
    rows: list[Row] = [
        {"grade": "exact", "log_ratio": [0.1, 0.2, 0.1], "kl": [1e-3, math.inf, 1e-3], "tv": [0.01, 0.5, 0.01]},
        {"grade": "exact", "log_ratio": [0.1], "kl": [1e-3], "tv": [0.01]},
    ]
    found = curves(rows, 64)["exact"]
    assert all(math.isfinite(value) for values in found.published.values() for value in values)
    # 4 T min(1, sqrt(delta/2)) min(1, sqrt(D_seq/2)): the first token's divergence is finite, the second's is not
    assert found.published["mixed_bound"][:2] == [pytest.approx(4 * math.sqrt(1e-3 / 2)), 8.0]


def test_neither_batches_nor_halves_matter() -> None:
    rows = sorted(mixed_rows(), key=lambda row: row["grade"])
    batch, data = score_batch(rows), counts(len(rows), 50)
    parts = [batch.slice(a, b - a) for a, b in itertools.pairwise((0, 1, 18, 18, 70, 160))]
    whole = bound_curves(evidence(batch), data, 1.0)
    separate = [evidence(part) for part in parts]
    for totals in (evidence(*parts), reduce(merged, separate), reduce(merged, separate[::-1])):
        found = bound_curves(totals, data, 1.0)
        assert [*found] == [*whole]
        for name, expected in whole.items():
            assert found[name].horizons == expected.horizons
            for bound, values in expected.published.items():
                assert found[name].published[bound] == pytest.approx(values, rel=1e-12)


def test_only_the_rows_asked_for_enter_the_sums_by_position() -> None:
    rows = [row for row in mixed_rows() if row["grade"] == "exact"]
    batch, totals = ScoreBatch(score_batch(rows)), DivergenceTotals()
    chosen = np.arange(len(rows)) % 3 == 0
    totals.add(batch, EVIDENCE["exact"], chosen)
    lists = lists_of([row for row, inside in zip(rows, chosen, strict=True) if inside], "exact", "kl")
    longest = max(map(len, lists))
    expected = [math.fsum(values[t] for values in lists if len(values) > t) / len(lists) for t in range(longest)]
    assert totals.kl_by_position.means(totals.rows) == pytest.approx(expected, rel=1e-12)
