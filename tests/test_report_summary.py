"""Every number of the report equals a plain loop over the rows, whatever batches and builders they came through."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report_rows import Row, random_rows, score_batch, token_values

from trm_audit.errors import BadInput, UsageError
from trm_audit.numerics.bounds import error_bounds
from trm_audit.numerics.confidence import clopper_pearson_upper
from trm_audit.numerics.histogram import RELATIVE_ERROR
from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.summary import AuditSummary, Thresholds

GRADES = ("exact", "sketch", "interval", "sampled")


def mixed_rows(seed: int = 0, count: int = 40) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = [row for grade in GRADES for row in random_rows(rng, count, grade)]
    random.Random(seed).shuffle(rows)
    return rows


def summarize(*batches: pa.RecordBatch, builder: SummaryBuilder | None = None, **given: Any) -> AuditSummary:
    builder = builder or SummaryBuilder()
    for batch in batches:
        builder.add(batch)
    return builder.finish(**given)


def column(rows: list[Row], kind: str, name: str) -> list[float]:
    """`seq_kind_name` of the rows that have it."""
    statistic = {"max": max, "sum": math.fsum, "mean": lambda v: math.fsum(v) / len(v)}[kind]
    return [statistic(values) for row in rows if (values := token_values(row, name))]


def of_grade(rows: list[Row], grade: str) -> list[Row]:
    return [row for row in rows if row["grade"] == grade]


def test_counts_are_those_of_the_rows() -> None:
    rows = mixed_rows()
    counts = summarize(score_batch(rows), num_skipped=3).counts
    lengths = [sum(row["response_mask"]) for row in rows]
    assert counts.n_total == 160
    assert counts.grades == dict.fromkeys(GRADES, 40)
    assert list(counts.grades) == list(GRADES)
    assert counts.audited_policies == {"sampling": 160}
    assert counts.num_tokens == sum(lengths)
    assert counts.num_without_policy_tokens == lengths.count(0) > 0
    assert counts.num_disagreements == sum(row["num_disagreements"] for row in rows)
    assert (counts.num_groups, counts.num_skipped, counts.horizon) == (5, 3, max(lengths))


@pytest.mark.parametrize("name", ["log_ratio", "k3", "ratio", "kl", "tv", "kl_upper"])
def test_token_quantiles_are_numpys_over_policy_tokens_only(name: str) -> None:
    rows = mixed_rows()
    values = [v for row in rows for v in token_values(row, name) or []]
    spread = summarize(score_batch(rows)).tokens[name]
    assert (spread.n, spread.min, spread.max) == (len(values), min(values), max(values))
    assert spread.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-12)
    for q, got in ((0.5, spread.p50), (0.9, spread.p90), (0.99, spread.p99), (0.999, spread.p999)):
        around = np.quantile(np.abs(values), 1.0) if name == "log_ratio" else np.quantile(values, q, method="higher")
        assert abs(got - np.quantile(values, q)) <= RELATIVE_ERROR * around


def test_sequence_statistics_leave_out_sequences_without_policy_tokens() -> None:
    rows = mixed_rows()
    sequences = summarize(score_batch(rows)).sequences
    for kind, name in itertools.product(("max", "mean", "sum"), ("k3", "kl", "tv_upper", "abs_log_ratio")):
        values = column(rows, kind, name)
        spread = sequences[f"seq_{kind}_{name}"]
        assert (spread.n, spread.max) == (len(values), max(values))
        assert spread.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-12)


def test_identical_policies_are_zero_apart_everywhere() -> None:
    rows = [
        {"grade": "exact", "reward": float(n)} | dict.fromkeys(("log_ratio", "kl", "kl_reverse", "tv"), [0.0] * n)
        for n in (1, 2, 5)
    ]
    summary = summarize(score_batch(rows))
    assert all(spread.max == spread.mean == 0 for name, spread in summary.tokens.items() if name != "ratio")
    assert all(pair.published == 0 for block in summary.bounds["all"].values() for pair in block.bounds.values())
    assert (summary.metrics["mean_ratio"].value, summary.metrics["ess_token"].value) == (1, 1)
    assert summary.metrics["ess_seq"].value == pytest.approx(1, rel=1e-15)
    assert summary.rewards is not None
    assert summary.rewards.surrogate is not None
    assert summary.rewards.surrogate.mean == 0


def assert_equal_trees(a: Any, b: Any) -> None:
    """Equal but for the rounding of sums."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal_trees(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_trees(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)
    else:
        assert a == b


def keeping_small_k2(batch: pa.RecordBatch) -> pa.RecordBatch:
    values = batch.column("seq_max_k2").to_numpy(zero_copy_only=False)
    return batch.append_column("keep", pa.array(np.nan_to_num(values, nan=np.inf) <= 0.1))


def test_batches_and_builders_in_any_order_give_the_same_report() -> None:
    rows = mixed_rows()
    thresholds = Thresholds(delta_max=0.1, max_of="k2", avg_of="k3")

    def fresh() -> SummaryBuilder:
        return SummaryBuilder(thresholds, ["seq_max_k2 <= 0.1"])

    # GIVEN all rows at once, and in parts of uneven size through builders of their own (one of them empty)
    whole_batch = keeping_small_k2(score_batch(rows))
    whole = summarize(whole_batch, builder=fresh()).to_dict()
    parts = [whole_batch.slice(a, b - a) for a, b in itertools.pairwise((0, 1, 18, 19, 70, 160, 160))]
    builders = []
    for part in parts:
        builders.append(fresh())
        builders[-1].add(part)
    # WHEN merged in any order
    for order in (builders, builders[::-1], [builders[i] for i in (3, 0, 5, 1, 4, 2)]):
        merged = order[0]
        for builder in order[1:]:
            merged = merged + builder
        # THEN nothing changes
        assert_equal_trees(merged.finish().to_dict(), whole)


def test_builders_with_different_thresholds_cannot_be_added() -> None:
    with pytest.raises(UsageError, match="different thresholds"):
        SummaryBuilder(Thresholds(delta_max=0.1)) + SummaryBuilder(Thresholds(delta_max=0.2))


def test_acceptance_curves_equal_a_loop_over_rows_at_every_delta() -> None:
    rows = mixed_rows()
    empty = sum(1 for row in rows if not any(row["response_mask"]))
    curves = summarize(score_batch(rows)).acceptance_curves
    for kind, name in (("max", "k2"), ("mean", "k3"), ("sum", "kl"), ("max", "kl_upper")):
        values, curve = column(rows, kind, name), curves.curves[f"seq_{kind}_{name}"]
        assert curve.n == len(values) + empty
        assert curve.share == [sum(v <= delta for v in values) / curve.n for delta in curves.deltas]
    assert 0.05 in curves.deltas
    assert "seq_max_log_ratio" not in curves.curves


def test_combined_acceptance_is_exact_at_every_pair_of_thresholds() -> None:
    rows = mixed_rows()
    empty = sum(1 for row in rows if not any(row["response_mask"]))
    builder = SummaryBuilder(Thresholds(max_of="abs_log_ratio", avg_of="k3"))
    combined = {(c.max_of, c.avg_of): c for c in summarize(score_batch(rows), builder=builder).acceptance_combined}
    assert set(combined) == {("kl", "kl"), ("kl_estimate", "kl_estimate"), ("k2", "k3"), ("abs_log_ratio", "k3")}
    for (max_of, avg_of), found in combined.items():
        pairs = list(zip(column(rows, "max", max_of), column(rows, "mean", avg_of), strict=True))
        assert found.n == len(pairs) + empty
        for i, j in itertools.product(range(0, len(found.deltas), 3), repeat=2):
            kept = sum(a <= found.deltas[i] and b <= found.deltas[j] for a, b in pairs)
            assert found.share[i][j] == kept / found.n


EVIDENCE = {
    "exact": ("kl", "kl", "tv", "tv", ""),
    "sketch": ("kl_upper", "kl_upper", "tv_upper", "tv_upper", "_upper"),
    "interval": ("kl_upper", "kl_upper", "tv_upper", "tv_upper", "_upper"),
    "sampled": ("k2", "k3", None, "half_abs_ratio_minus_1", "_estimate"),
}


def drift_of(rows: list[Row], name: str) -> np.ndarray:
    """Mean over all rows of the tv quantity at each policy token, 0 after the end."""
    lists = []
    for row in rows:
        values = token_values(row, "ratio" if name.startswith("half") else name) or []
        lists.append([abs(v - 1) / 2 for v in values] if name.startswith("half") else values)
    longest = max(map(len, lists))
    return np.array([math.fsum(v[t] for v in lists if len(v) > t) / len(lists) for t in range(longest)])


@pytest.mark.parametrize("evidence", EVIDENCE)
def test_bounds_of_each_evidence_are_those_of_its_own_rows(evidence: str) -> None:
    rows = mixed_rows()
    kl_max, kl_seq, tv_max, tv_token, suffix = EVIDENCE[evidence]
    block = summarize(score_batch(rows), horizon=50).bounds["all"][evidence]
    members = rows if evidence == "sampled" else of_grade(rows, evidence)
    expected = error_bounds(
        50,
        kl_max=max(column(members, "max", kl_max)),
        kl_seq=math.fsum(column(members, "sum", kl_seq)) / len(members),
        tv_max=max(column(members, "max", tv_max)) if tv_max else None,
        tv_by_position=drift_of(members, tv_token),
    )
    assert block.rows == len(members)
    assert list(block.bounds) == [name + suffix for name in expected.bounds]
    for name, pair in expected.bounds.items():
        assert block.bounds[name + suffix].published == pytest.approx(pair.published, rel=1e-12)
        assert block.bounds[name + suffix].sharp == pytest.approx(pair.sharp, rel=1e-12)
    assert block.minimum == expected.minimum + suffix
    assert block.vacuous == expected.vacuous


def test_exact_and_estimated_bounds_never_share_a_name() -> None:
    blocks = summarize(score_batch(mixed_rows())).bounds["all"]
    names = {evidence: set(block.bounds) for evidence, block in blocks.items()}
    assert list(names) == list(EVIDENCE)
    # upper bounds of sketches and of intervals have one name, in blocks of their own
    assert names["sketch"] == names.pop("interval")
    assert all(not a & b for a, b in itertools.combinations(names.values(), 2))


def test_bounds_on_kept_rows_are_labelled_conditional() -> None:
    rows = of_grade(mixed_rows(), "exact")
    summary = summarize(keeping_small_k2(score_batch(rows)))
    kept = [row for row in rows if (values := token_values(row, "k2")) and max(values) <= 0.1]
    block = summary.bounds["kept"]["exact"]
    assert block.rows == len(kept) == summary.n_kept
    assert block.inputs["seq_max_kl"] == max(column(kept, "max", "kl"))
    assert "conditional" in block.label
    assert any("conditional" in note for note in summary.notes)
    assert "conditional" not in summary.bounds["all"]["exact"].label
    assert block.minorizer is None


def test_the_report_says_that_maxima_over_visited_contexts_are_lower_bounds() -> None:
    notes = summarize(score_batch(mixed_rows())).notes
    assert any("lower bound of the theory's maximum" in note and "plug-in estimate" in note for note in notes)


def test_a_horizon_shorter_than_a_response_is_refused() -> None:
    with pytest.raises(UsageError, match="shorter than the longest response"):
        summarize(score_batch(mixed_rows()), horizon=2)


def test_d_seq_counts_rows_without_policy_tokens_as_zero_and_clusters_by_group() -> None:
    rows = of_grade(mixed_rows(), "exact")
    total = summarize(score_batch(rows)).d_seq["seq_sum_kl"]
    sums = [math.fsum(token_values(row, "kl") or []) for row in rows]
    mean = math.fsum(sums) / len(sums)
    by_group: dict[str, float] = {}
    for row, value in zip(rows, sums, strict=True):
        by_group[row["group_id"]] = by_group.get(row["group_id"], 0.0) + value - mean
    groups = len(by_group)
    error = math.sqrt(sum(v * v for v in by_group.values()) * groups / (groups - 1)) / len(rows)
    assert total.interval.mean == pytest.approx(mean, rel=1e-12)
    assert total.interval.high - total.interval.low == pytest.approx(2 * 2.7764451051977987 * error, rel=1e-9)
    assert "cluster-robust by group_id (5 groups)" in total.method


def test_without_group_id_the_interval_says_that_sequences_count_as_independent() -> None:
    summary = summarize(score_batch(of_grade(mixed_rows(), "exact"), without=["group_id"]))
    assert summary.d_seq["seq_sum_kl"].method == "95 %, 40 sequences taken as independent"
    assert summary.counts.num_groups is None


def test_violations_count_sequences_and_prompts() -> None:
    rows = of_grade(mixed_rows(), "exact")
    rows[0]["group_id"] = None
    builder = SummaryBuilder(Thresholds(delta_max=0.15, max_of="kl"))
    found = summarize(score_batch(rows), builder=builder).violations
    assert found is not None
    compared = [row for row in rows if token_values(row, "kl")]
    above = [row for row in compared if max(token_values(row, "kl") or []) > 0.15]
    prompts = {row["group_id"] or row["rollout_id"] for row in compared}
    bad = {row["group_id"] or row["rollout_id"] for row in above}
    assert (found.sequences.n, found.sequences.violations) == (len(compared), len(above))
    assert found.sequences.upper_95 == pytest.approx(clopper_pearson_upper(len(above), len(compared)))
    assert found.prompts is not None
    assert (found.prompts.n, found.prompts.violations) == (len(prompts), len(bad))
    assert 0 < len(bad) <= len(above) < len(compared)


def test_the_grades_default_divergence_decides_where_none_is_named() -> None:
    rows = mixed_rows()
    found = summarize(score_batch(rows), builder=SummaryBuilder(Thresholds(delta_max=0.05))).violations
    assert found is not None
    others = [[*(token_values(row, "k2") or [0.0]), *(token_values(row, "kl_lower") or [])] for row in rows]
    known = [token_values(row, "kl") or token_values(row, "kl_estimate") for row in rows]
    values = [max(own or other) for own, other in zip(known, others, strict=True)]
    assert found.sequences.violations == sum(v > 0.05 for v in values)
    assert found.divergence == (
        "seq_max_kl where exact, seq_max_kl_estimate where sketched, the larger of seq_max_k2 and seq_max_kl_lower "
        "elsewhere"
    )


@pytest.mark.parametrize(
    ("grade", "said"),
    [
        ("exact", "seq_max_kl"),
        ("sketch", "seq_max_kl_estimate"),
        ("interval", "the larger of seq_max_k2 and seq_max_kl_lower"),
        ("sampled", "seq_max_k2"),
    ],
)
def test_what_delta_max_is_compared_with_is_named_for_the_grades_that_occur(grade: str, said: str) -> None:
    batch = score_batch(of_grade(mixed_rows(), grade))
    found = summarize(batch, builder=SummaryBuilder(Thresholds(delta_max=0.05))).violations
    assert found is not None
    assert found.divergence == said


def test_token_masking_drops_tokens_and_leaves_the_maximum() -> None:
    rows = of_grade(mixed_rows(), "exact")
    masking = summarize(score_batch(rows), builder=SummaryBuilder(Thresholds(delta_max=0.1, max_of="kl"))).token_masking
    assert masking is not None
    values = [v for row in rows for v in token_values(row, "kl") or []]
    assert (masking.num_tokens, masking.num_dropped) == (len(values), sum(v > 0.1 for v in values))
    assert masking.max_after == masking.max_before == max(values)


def test_breakdowns_equal_loops_over_each_category() -> None:
    rows = mixed_rows()
    summary = summarize(keeping_small_k2(score_batch(rows)))
    for name, found in (("engine", summary.by_engine), ("policy_version", summary.by_policy_version)):
        assert [category.value for category in found] == sorted({row[name] for row in rows})
        for category in found:
            members = [row for row in rows if row[name] == category.value]
            kept = sum(bool(v := token_values(row, "k2")) and max(v) <= 0.1 for row in members)
            assert (category.n, category.acceptance) == (len(members), kept / len(members))
            assert category.num_tokens == sum(sum(row["response_mask"]) for row in members)
            for divergence in ("kl", "k3"):
                values = [v for row in members for v in token_values(row, divergence) or []]
                assert category.divergences[divergence].mean == pytest.approx(
                    math.fsum(values) / len(values), rel=1e-12
                )
                assert category.divergences[divergence].max == max(values)
    assert summary.by_staleness == []


def test_lists_of_policy_versions_count_as_their_oldest() -> None:
    rows = [{"grade": "sampled", "log_ratio": [0.1, 0.2], "policy_version": v} for v in ([4, 3], [5, 5], None, [3, 9])]
    found = summarize(score_batch(rows)).by_policy_version
    assert [(category.value, category.n) for category in found] == [(3, 2), (5, 1)]


def test_rows_of_a_training_shard_bring_their_verdicts_and_reasons() -> None:
    rows = of_grade(mixed_rows(), "exact")
    batch = score_batch(rows, without=["kl", "kl_reverse", "tv"])
    # GIVEN a training shard: lists hold 0.0 outside the mask, verdicts and reasons stand in columns
    lists = [[v if m else 0.0 for v, m in zip(row["log_ratio"], row["response_mask"], strict=True)] for row in rows]
    batch = batch.drop_columns("log_ratio").append_column("log_ratio", pa.array(lists, pa.list_(pa.float64())))
    keep = [i % 3 > 0 for i in range(len(rows))]
    reason = [
        None if k else "seq_max_kl_above_delta_max(value=0.0612, position=17, delta=0.05); not_a_number" for k in keep
    ]
    reason[0] = "no_policy_tokens"
    batch = batch.append_column("keep", pa.array(keep)).append_column("reason", pa.array(reason))
    summary = summarize(batch)
    assert summary.n_kept == sum(keep)
    assert summary.acceptance == sum(keep) / len(keep)
    several = len(keep) - sum(keep) - 1
    assert summary.reasons == {"seq_max_kl_above_delta_max": several, "not_a_number": several, "no_policy_tokens": 1}
    assert summary.tokens["log_ratio"].n == sum(sum(row["response_mask"]) for row in rows)
    assert "kl" not in summary.tokens
    assert summary.bounds["all"]["exact"].inputs["mean_seq_sum_tv"] is None


def test_dropped_rows_still_count_in_n() -> None:
    rows = of_grade(mixed_rows(), "exact")[:10]
    batch = score_batch(rows).append_column("keep", pa.array([True] * 10))
    summary = summarize(batch, num_dropped=30)
    assert (summary.counts.n_total, summary.n_kept, summary.acceptance) == (40, 10, 0.25)
    assert "dropped_rows" in [finding.code for finding in summary.warnings]


def test_the_surrogate_is_over_all_rows_or_it_is_not_there() -> None:
    rows = [row | {"reward": float(i % 2)} for i, row in enumerate(of_grade(mixed_rows(), "exact")[:10])]
    batch = score_batch(rows).append_column("keep", pa.array([True] * 10))
    whole, kept = summarize(batch).rewards, summarize(batch, num_dropped=30).rewards
    assert whole is not None
    assert kept is not None
    assert whole.surrogate is not None
    assert kept.surrogate is None
    assert kept.masked_objective == pytest.approx((whole.masked_objective or 0) / 4)


def test_statistics_alone_are_enough() -> None:
    batch = pa.RecordBatch.from_pydict({"seq_max_kl": [0.01, 0.2, None], "seq_sum_kl": [0.02, 0.5, None]})
    summary = summarize(batch, horizon=100)
    assert summary.sequences["seq_max_kl"].max == 0.2
    expected = error_bounds(100, kl_max=0.2, kl_seq=0.26)
    assert summary.bounds["all"]["exact"].bounds == expected.bounds
    assert summary.counts.num_tokens == 0
    assert (summary.acceptance, summary.rewards, summary.ppo, summary.violations) == (None, None, None, None)


def test_infinite_divergences_are_written_as_strings_and_nothing_as_nan() -> None:
    rows = of_grade(mixed_rows(), "exact")
    longest = max(rows, key=lambda row: sum(row["response_mask"]))
    at = longest["response_mask"].index(True)
    longest["kl"][at], longest["log_ratio"][at], longest["num_infinite"] = math.inf, -math.inf, 1
    summary = summarize(score_batch(rows), builder=SummaryBuilder(Thresholds(delta_max=0.05, max_of="kl")))
    report = json.loads(summary.to_json())
    assert report["tokens"]["kl"]["max"] == report["tokens"]["k3"]["max"] == "inf"
    assert report["tokens"]["log_ratio"]["min"] == "-inf"
    assert report["d_seq"]["seq_sum_kl"]["interval"] == {"mean": "inf", "low": None, "high": None, "clusters": 5}
    assert report["counts"]["num_infinite"] == 1
    assert math.isfinite(report["bounds"]["all"]["exact"]["bounds"]["mixed_bound"]["published"])
    assert "NaN" not in summary.to_json()


def test_types_that_arrow_writers_choose_make_no_difference() -> None:
    rows = mixed_rows()
    batch = score_batch(rows)
    columns = {name: batch.column(name) for name in batch.schema.names}
    columns["log_ratio"] = columns["log_ratio"].cast(pa.large_list(pa.float64()))
    columns["engine"] = columns["engine"].dictionary_encode()
    columns["group_id"] = columns["group_id"].cast(pa.large_string())
    columns["num_tokens"] = columns["num_tokens"].cast(pa.int32())
    assert summarize(pa.RecordBatch.from_pydict(columns)).to_dict() == summarize(batch).to_dict()


def test_values_of_a_dictionary_that_do_not_occur_are_no_groups_and_no_engines() -> None:
    batch = pa.RecordBatch.from_pydict(
        {
            "group_id": pa.array(["a", "b", "b", None]).dictionary_encode(),
            "engine": pa.array(["x", "x", "y", None]).dictionary_encode(),
            "seq_sum_k3": [0.1, 0.2, 0.3, 0.4],
        }
    )
    summary = summarize(batch.slice(1, 3))
    assert summary.counts.num_groups == 2
    assert [category.value for category in summary.by_engine] == ["x", "y"]


def test_columns_of_nulls_are_as_good_as_absent() -> None:
    names = ("group_id", "engine", "grade", "reward", "policy_version", "staleness", "log_ratio", "reason")
    alone = pa.RecordBatch.from_pydict({"seq_max_kl": [0.1, 0.2]})
    batch = pa.RecordBatch.from_pydict({"seq_max_kl": [0.1, 0.2]} | {name: [None, None] for name in names})
    assert summarize(batch, horizon=5).to_dict() == summarize(alone, horizon=5).to_dict()


def test_a_mask_of_another_length_is_an_error_that_names_the_rule() -> None:
    batch = pa.RecordBatch.from_pydict({"log_ratio": [[0.1], [0.1, 0.2]], "response_mask": [[True], [True]]})
    with pytest.raises(BadInput, match=r"row 1 .*log_ratio has 2 tokens, other per-token columns have 1(.|\n)*rule 4"):
        summarize(batch)


def test_no_rows_make_a_report_without_claims() -> None:
    summary = SummaryBuilder().finish()
    assert summary.verdict == "No rollouts were read."
    assert (summary.acceptance, summary.bounds, summary.tokens) == (None, {}, {})
    assert json.loads(summary.to_json())["counts"]["n_total"] == 0


def test_every_field_of_the_summary_reaches_the_json() -> None:
    report = summarize(score_batch(mixed_rows())).to_dict()
    assert list(report) == ["kind", "schema_version", *(f.name for f in dataclasses.fields(AuditSummary))]


def test_building_a_report_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import trm_audit.report.builder, trm_audit.report.gates, trm_audit.numerics.bounds;"
        "print([m for m in ('torch', 'transformers', 'scipy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
