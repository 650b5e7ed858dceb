"""The figures of training logs equal plain float64 loops over rows, whatever the order, the batches and the columns."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report_rows import Row, random_rows, score_batch, token_values

from trm_audit.numerics.ragged import Bools
from trm_audit.report.blocks import Metric
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.metrics import DEFINITIONS, NUM_BUCKETS, MetricTotals, statistics

SAMPLED = {name for name in DEFINITIONS if name not in ("mean_kl", "mean_kl_reverse", "acceptance")} - {
    f"mean_{name}" for name in ("tv", "kl_estimate", "kl_lower", "kl_upper", "tv_lower", "tv_upper")
}
LISTS = ("log_ratio", "kl", "kl_reverse", "tv", "kl_estimate", "kl_lower", "kl_upper", "tv_lower", "tv_upper")
FROM_LISTS = {"mean_exp_abs_log_ratio", "ess_token", "chi2_token"}
FROM_PROBABILITIES = {"mean_abs_probability_difference", "rollout_perplexity", "trainer_perplexity"}


def rows_with_probabilities(rng: np.random.Generator, count: int = 60) -> list[Row]:
    """A third exact, sketched, interval rows each, five groups of each, with the log-probabilities of `log_ratio`."""
    rows = [row for grade in ("exact", "sketch", "interval") for row in random_rows(rng, count // 3, grade)]
    for row in rows:
        row["group_id"] = row["grade"] + row["group_id"]
        row["rollout_logprobs"] = (-rng.exponential(1, len(row["log_ratio"]))).tolist()
        row["trainer_logprobs"] = [a + b for a, b in zip(row["rollout_logprobs"], row["log_ratio"], strict=True)]
    return rows


def totals_of(*batches: pa.RecordBatch, keep: Bools | None = None) -> MetricTotals:
    totals = MetricTotals()
    for batch in batches:
        totals.add(ScoreBatch(batch), keep)
    return totals


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def expected(rows: list[Row]) -> dict[str, float]:
    """Every figure from its definition, one sequence after another."""
    tokens: dict[str, list[float]] = defaultdict(list)
    sequences: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name in (*LISTS, "ratio", "k1", "k2", "k3", "abs_log_ratio", "rollout_logprobs", "trainer_logprobs"):
            values = token_values(row, name)
            tokens[name] += values or []
            if values:
                sequences[name].append(mean(values))
        if log_ratios := token_values(row, "log_ratio"):
            sequences["weight"].append(math.exp(math.fsum(log_ratios)))
    out = {f"mean_{name}": mean(values) for name, values in tokens.items() if values and "log" not in name[:8]}
    out["mean_abs_log_ratio"] = mean(tokens["abs_log_ratio"])
    out["max_abs_log_ratio"] = max(tokens["abs_log_ratio"])
    out["mean_exp_abs_log_ratio"] = mean([math.exp(v) for v in tokens["abs_log_ratio"]])
    pairs = zip(tokens["trainer_logprobs"], tokens["rollout_logprobs"], strict=True)
    out["mean_abs_probability_difference"] = mean([abs(math.exp(a) - math.exp(b)) for a, b in pairs])
    for kind, weights in (("token", tokens["ratio"]), ("seq", sequences["weight"])):
        squares = math.fsum(w * w for w in weights)
        out[f"ess_{kind}"] = math.fsum(weights) ** 2 / (len(weights) * squares)
        out[f"chi2_{kind}"] = squares / len(weights) - 1
    out["mean_seq_mean_k3"] = mean(sequences["k3"])
    out["mean_seq_mean_abs_log_ratio"] = mean(sequences["abs_log_ratio"])
    out["rollout_perplexity"] = mean([math.exp(-v) for v in sequences["rollout_logprobs"]])
    out["trainer_perplexity"] = mean([math.exp(-v) for v in sequences["trainer_logprobs"]])
    out["ppl_ratio"] = mean([math.exp(-v) for v in sequences["log_ratio"]])
    out["log_ppl_difference"] = -mean(sequences["log_ratio"])
    out["abs_log_ppl_difference"] = mean([abs(v) for v in sequences["log_ratio"]])
    return {name: value for name, value in out.items() if name in DEFINITIONS}


def assert_same(a: dict[str, Metric], b: dict[str, Metric], rel: float = 1e-9) -> None:
    assert list(a) == list(b)
    for name in a:
        assert (a[name].n, a[name].clusters) == (b[name].n, b[name].clusters), name
        for field in ("value", "low", "high"):
            given, other = getattr(a[name], field), getattr(b[name], field)
            assert given == pytest.approx(other, rel=rel, abs=1e-12, nan_ok=True), (name, field)


def test_every_figure_equals_a_loop_over_the_rows() -> None:
    rows = rows_with_probabilities(np.random.default_rng(1))
    found = totals_of(score_batch(rows)).finish()
    wanted = expected(rows)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].value == pytest.approx(value, rel=1e-10), name


def test_every_definition_is_a_figure_and_stands_in_its_place() -> None:
    rows = rows_with_probabilities(np.random.default_rng(2))
    found = totals_of(score_batch(rows), keep=np.arange(60) % 3 > 0).finish()
    assert list(found) == list(DEFINITIONS)
    for name, metric in found.items():
        assert (metric.definition, metric.elsewhere) == DEFINITIONS[name]


def test_the_figures_are_what_verls_formulas_give_on_padded_arrays() -> None:
    # GIVEN the same rows padded to one length, as verl holds them; rows without policy tokens left out
    rows = [row for row in rows_with_probabilities(np.random.default_rng(3)) if any(row["response_mask"])]
    length = max(len(row["log_ratio"]) for row in rows)
    trainer, rollout, mask = np.zeros((3, len(rows), length))
    for i, row in enumerate(rows):
        n = len(row["log_ratio"])
        trainer[i, :n], rollout[i, :n] = row["trainer_logprobs"], row["rollout_logprobs"]
        mask[i, :n] = row["response_mask"]
    sizes = mask.sum(axis=1)
    log_ratio = trainer - rollout
    log_ppl_diff = (rollout * mask).sum(axis=1) / sizes - (trainer * mask).sum(axis=1) / sizes
    verl = {
        "rollout_corr/kl": (-log_ratio * mask).sum() / mask.sum(),
        "rollout_corr/k3_kl": ((np.exp(log_ratio) - log_ratio - 1) * mask).sum() / mask.sum(),
        "rollout_corr/training_ppl": np.exp(-(trainer * mask).sum(axis=1) / sizes).mean(),
        "rollout_corr/rollout_ppl": np.exp(-(rollout * mask).sum(axis=1) / sizes).mean(),
        "rollout_corr/log_ppl_diff": log_ppl_diff.mean(),
        "rollout_corr/log_ppl_abs_diff": np.abs(log_ppl_diff).mean(),
        "rollout_corr/ppl_ratio": np.exp(log_ppl_diff).mean(),
        "rollout_corr/chi2_token": (np.exp(2 * np.clip(log_ratio, -20, 20)) * mask).sum() / mask.sum() - 1,
        "rollout_corr/chi2_seq": np.exp(2 * np.clip((log_ratio * mask).sum(axis=1), -20, 20)).mean() - 1,
        "training/rollout_probs_diff_mean": (np.abs(np.exp(trainer) - np.exp(rollout)) * mask).sum() / mask.sum(),
    }
    # THEN what we name like theirs is equal, and nothing of it is missing
    found = totals_of(score_batch(rows)).finish()
    named = {m.elsewhere["verl"]: m.value for m in found.values() if "verl" in m.elsewhere}
    assert set(named) == set(verl)
    for name, value in verl.items():
        assert named[name] == pytest.approx(value, rel=1e-10), name


def test_no_project_logs_two_figures_by_one_name() -> None:
    names = [(project, name) for _, elsewhere in DEFINITIONS.values() for project, name in elsewhere.items()]
    assert len(names) == len(set(names))


def test_two_halves_added_are_the_whole_in_any_order() -> None:
    rows = rows_with_probabilities(np.random.default_rng(4))
    whole = totals_of(score_batch(rows)).finish()
    first, second = totals_of(score_batch(rows[:23])), totals_of(score_batch(rows[23:]))
    assert_same((first + second).finish(), whole)
    assert_same((second + first).finish(), whole)
    assert_same((second + MetricTotals() + first).finish(), whole)
    # AND the halves are what they were
    assert_same(first.finish(), totals_of(score_batch(rows[:23])).finish(), rel=0)


def test_batch_boundaries_and_the_order_of_rows_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    rows = rows_with_probabilities(rng)
    whole = totals_of(score_batch(rows)).finish()
    assert_same(totals_of(*(score_batch([row]) for row in rows)).finish(), whole)
    assert_same(totals_of(score_batch([rows[i] for i in rng.permutation(60)])).finish(), whole)


def test_stored_statistics_and_lists_give_the_same_figures() -> None:
    rows = rows_with_probabilities(np.random.default_rng(6))
    whole = totals_of(score_batch(rows)).finish()
    stored = [name for name in score_batch(rows).schema.names if name.startswith("seq_")]
    assert_same(totals_of(score_batch(rows, without=stored)).finish(), whole)
    assert_same(totals_of(score_batch(rows, without=["num_tokens"])).finish(), whole)
    assert_same(totals_of(score_batch(rows, without=[n for n in stored if "seq_mean" in n])).finish(), whole)


def test_without_lists_the_figures_that_stored_statistics_give_remain() -> None:
    rows = rows_with_probabilities(np.random.default_rng(7))
    whole = totals_of(score_batch(rows)).finish()
    found = totals_of(score_batch(rows, without=(*LISTS, "rollout_logprobs", "trainer_logprobs"))).finish()
    assert set(whole) - set(found) == FROM_LISTS | FROM_PROBABILITIES
    assert_same(found, {name: whole[name] for name in found})


@pytest.mark.parametrize("name", ["log_ratio", "rollout_logprobs", "trainer_logprobs", "kl", "tv_upper", "reward"])
def test_a_missing_column_takes_no_figure_but_its_own(name: str) -> None:
    rows = rows_with_probabilities(np.random.default_rng(8))
    whole = totals_of(score_batch(rows)).finish()
    without = [name, *(n for n in score_batch(rows).schema.names if n.endswith(f"_{name}") and n.startswith("seq_"))]
    if name == "log_ratio":
        without = [name]
    lost = {
        "log_ratio": FROM_LISTS,
        "kl": {"mean_kl"},
        "tv_upper": {"mean_tv_upper"},
        "rollout_logprobs": {"rollout_perplexity", "mean_abs_probability_difference"},
        "trainer_logprobs": {"trainer_perplexity", "mean_abs_probability_difference"},
    }
    found = totals_of(score_batch(rows, without=without)).finish()
    assert set(whole) - set(found) == lost.get(name, set())
    assert_same(found, {name: whole[name] for name in found})


@pytest.mark.parametrize("name", ["rollout_logprobs", "trainer_logprobs", "kl", "kl_upper"])
def test_rows_whose_list_is_null_count_only_in_the_other_figures(name: str) -> None:
    rng = np.random.default_rng(9)
    rows = rows_with_probabilities(rng)
    nulls: list[Row] = [row | {name: None} if i % 3 == 0 else row for i, row in enumerate(rows)]
    found = totals_of(score_batch(nulls)).finish()
    complete = expected([row for i, row in enumerate(rows) if i % 3 and any(row["response_mask"])])
    figure = {"rollout_logprobs": "rollout_perplexity", "trainer_logprobs": "trainer_perplexity"}.get(
        name, f"mean_{name}"
    )
    assert found[figure].value == pytest.approx(complete[figure], rel=1e-10)
    assert found["mean_k3"].value == pytest.approx(expected(rows)["mean_k3"], rel=1e-10)


def test_rows_with_null_log_ratios_count_only_where_statistics_are_stored() -> None:
    rows = rows_with_probabilities(np.random.default_rng(10))
    batch = score_batch(rows)
    lists = [None if i % 2 else row for i, row in enumerate(batch.column("log_ratio").to_pylist())]
    at = batch.schema.get_field_index("log_ratio")
    found = totals_of(batch.set_column(at, "log_ratio", pa.array(lists, pa.list_(pa.float64())))).finish()
    # THEN means come from all rows, and the effective sample size of tokens from one set of tokens throughout
    assert found["mean_ratio"].value == pytest.approx(expected(rows)["mean_ratio"], rel=1e-10)
    assert found["ess_token"].value == pytest.approx(expected(rows[::2])["ess_token"], rel=1e-10)
    assert found["ess_token"].n == sum(len(token_values(row, "log_ratio") or []) for row in rows[::2])


def test_nothing_gives_no_figures() -> None:
    assert MetricTotals().finish() == {}
    assert totals_of(score_batch(random_rows(np.random.default_rng(0), 3)).slice(0, 0)).finish() == {}
    assert totals_of(pa.RecordBatch.from_pydict({"reward": pa.array([1.0, 2.0])})).finish() == {}
    assert (MetricTotals() + MetricTotals()).finish() == {}


def test_rows_without_policy_tokens_count_nowhere_but_in_the_acceptance() -> None:
    row: Row = {"rollout_id": "a", "log_ratio": [0.1, -0.2], "response_mask": [True, True]}
    empty: Row = {"rollout_id": "b", "log_ratio": [0.5], "response_mask": [False]}
    with_empty = totals_of(score_batch([row, empty]), keep=np.array([True, False])).finish()
    alone = totals_of(score_batch([row])).finish()
    assert with_empty.pop("acceptance").value == 0.5
    assert {name: m.value for name, m in with_empty.items()} == {name: m.value for name, m in alone.items()}
    assert with_empty["ess_seq"].n == 1


def test_only_sampled_rows_have_only_sampled_figures() -> None:
    rows: list[Row] = [{"log_ratio": [0.1, 0.3], "rollout_id": f"r{i}"} for i in range(4)]
    assert set(totals_of(score_batch(rows)).finish()) == SAMPLED - FROM_PROBABILITIES


def test_a_token_that_the_trainer_excludes_makes_infinite_what_it_reaches_and_nothing_else() -> None:
    rows: list[Row] = [{"log_ratio": [0.1, -0.3], "rollout_id": f"r{i}"} for i in range(9)]
    for row in rows:
        row["rollout_logprobs"] = [-1.0, -1.0]
        row["trainer_logprobs"] = [-0.9, -1.3]
    rows.append({"rollout_id": "x", "log_ratio": [-math.inf, 0.1], "rollout_logprobs": [-1.0, -1.0]})
    rows[-1]["trainer_logprobs"] = [-math.inf, -0.9]
    found = totals_of(batch_with_infinities(rows)).finish()
    infinite = {name for name, metric in found.items() if math.isinf(metric.value)}
    assert infinite == {
        *("mean_k1", "mean_k2", "mean_k3", "mean_seq_mean_k3", "mean_abs_log_ratio", "mean_seq_mean_abs_log_ratio"),
        *("max_abs_log_ratio", "mean_exp_abs_log_ratio", "trainer_perplexity", "ppl_ratio", "log_ppl_difference"),
        "abs_log_ppl_difference",
    }
    for name, metric in found.items():
        assert math.isnan(metric.low) == (name in infinite), name
    # AND its sequence has the weight 0
    weights = [math.exp(-0.2)] * 9 + [0.0]
    assert found["ess_seq"].value == pytest.approx(math.fsum(weights) ** 2 / (10 * math.fsum(w * w for w in weights)))


def test_a_token_that_the_rollout_excluded_leaves_no_effective_sample_size() -> None:
    rows: list[Row] = [{"log_ratio": [0.1], "rollout_id": f"r{i}"} for i in range(4)]
    rows.append({"log_ratio": [math.inf], "rollout_id": "x"})
    for order in (rows, rows[::-1]):
        found = totals_of(*(batch_with_infinities([row]) for row in order)).finish()
        assert found["mean_ratio"].value == math.inf
        assert found["chi2_seq"].value == math.inf
        assert found["mean_k1"].value == -math.inf
        assert math.isnan(found["ess_token"].value)
        assert math.isnan(found["ess_seq"].value)


def test_infinities_of_both_signs_have_no_mean() -> None:
    rows: list[Row] = [{"log_ratio": [math.inf, 0.0], "rollout_id": "a"}, {"log_ratio": [-math.inf], "rollout_id": "b"}]
    found = totals_of(batch_with_infinities(rows)).finish()
    assert math.isnan(found["mean_k1"].value)
    assert found["mean_k3"].value == math.inf
    halves = totals_of(batch_with_infinities(rows[:1])) + totals_of(batch_with_infinities(rows[1:]))
    assert_same(halves.finish(), found)


def batch_with_infinities(rows: list[Row]) -> pa.RecordBatch:
    """Only lists: the loops that make statistics do not know infinity."""
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    return pa.RecordBatch.from_pydict(columns)


@pytest.mark.parametrize("order", ["ascending", "descending", "mixed"])
def test_weights_of_sequences_beyond_the_range_of_float64_keep_their_effective_sample_size(order: str) -> None:
    # GIVEN sums of log-ratios whose exponentials overflow, or are all 0
    for center in (-5000.0, 800.0):
        sums = center + np.random.default_rng(11).normal(0, 1.0, 50)
        sums = {"ascending": np.sort(sums), "descending": -np.sort(-sums), "mixed": sums}[order]
        rows = [{"rollout_id": [f"r{i}"], "seq_sum_log_ratio": [value]} for i, value in enumerate(sums)]
        batches = [pa.RecordBatch.from_pydict(row) for row in rows]
        # WHEN they come one by one, or in halves
        one_by_one = totals_of(*batches).finish()
        halves = (totals_of(*batches[:20]) + totals_of(*batches[20:])).finish()
        # THEN ESS is that of the weights relative to their largest
        weights = [math.exp(value - max(sums)) for value in sums]
        expected_ess = math.fsum(weights) ** 2 / (50 * math.fsum(w * w for w in weights))
        assert one_by_one["ess_seq"].value == pytest.approx(expected_ess, rel=1e-9)
        assert one_by_one["ess_seq"].low < expected_ess
        assert one_by_one["chi2_seq"].value == (math.inf if center > 0 else pytest.approx(-1.0))
        assert_same(halves, one_by_one)


def test_the_weights_of_sequences_are_compared_across_scales_that_float64_cannot_hold() -> None:
    # GIVEN weights so far apart that each scale leaves those below it at 0
    rows = [{"rollout_id": [str(v)], "seq_sum_log_ratio": [v]} for v in (-math.inf, -3000.0, 0.0, 3000.0)]
    batches = [pa.RecordBatch.from_pydict(row) for row in rows]
    assert totals_of(*batches).finish()["ess_seq"].value == pytest.approx(1 / 4)
    assert totals_of(*batches[::-1]).finish()["ess_seq"].value == pytest.approx(1 / 4)
    # AND an infinite one stays infinite
    infinite = pa.RecordBatch.from_pydict({"rollout_id": ["x"], "seq_sum_log_ratio": [math.inf]})
    for order in ((batches[1], infinite, batches[3]), (infinite, batches[3], batches[1])):
        assert totals_of(*order).finish()["chi2_seq"].value == math.inf
    # AND none but 0: no figure, but no warning either
    assert math.isnan(totals_of(batches[0]).finish()["ess_seq"].value)


def test_rollouts_of_one_group_are_one_cluster() -> None:
    rows = rows_with_probabilities(np.random.default_rng(12))
    assert totals_of(score_batch(rows)).finish()["mean_k3"].clusters == 15
    alone = totals_of(score_batch(rows, without=["group_id"])).finish()["mean_k3"]
    assert alone.clusters == sum(any(row["response_mask"]) for row in rows)
    unnamed = totals_of(score_batch(rows, without=["group_id", "rollout_id"])).finish()["mean_k3"]
    assert (unnamed.value, unnamed.clusters) == (pytest.approx(alone.value), alone.clusters)


def test_a_group_of_null_leaves_each_rollout_to_itself() -> None:
    rows: list[Row] = [
        {"rollout_id": f"r{i}", "group_id": "p" if i < 4 else None, "log_ratio": [0.1 * i]} for i in range(10)
    ]
    assert totals_of(score_batch(rows)).finish()["mean_k3"].clusters == 7


def test_rows_without_any_name_are_clusters_of_their_own_in_every_batch_and_half() -> None:
    batch = pa.RecordBatch.from_pydict({"log_ratio": [[0.1 * i] for i in range(12)]})
    whole = totals_of(batch).finish()
    assert whole["mean_k1"].clusters == 12
    assert_same(totals_of(batch.slice(0, 5), batch.slice(5)).finish(), whole)
    assert_same((totals_of(batch.slice(0, 5)) + totals_of(batch.slice(5))).finish(), whole)


def test_the_number_of_clusters_kept_apart_is_bounded() -> None:
    count = 100_000
    batch = pa.RecordBatch.from_pydict(
        {"rollout_id": [f"r{i}" for i in range(count)], "seq_sum_log_ratio": np.full(count, 0.1)}
    )
    keys, sums = totals_of(batch).clusters()
    # THEN about as many buckets are used as that many random numbers hit
    assert len(keys) == pytest.approx(NUM_BUCKETS * (1 - math.exp(-count / NUM_BUCKETS)), rel=0.05)
    assert keys.max() < NUM_BUCKETS
    assert totals_of(batch).finish()["ess_seq"].n == count
    np.testing.assert_allclose(statistics(sums.sum(axis=0))["ess_seq"], 1.0)


def test_an_effect_of_the_prompt_widens_the_interval_of_groups() -> None:
    # GIVEN eight rollouts of each of 40 prompts, equal within a prompt
    rng = np.random.default_rng(13)
    rows: list[Row] = [
        {"rollout_id": f"p{p}-{i}", "group_id": f"p{p}", "log_ratio": [value]}
        for p, value in enumerate(rng.normal(0, 0.3, 40))
        for i in range(8)
    ]
    grouped = totals_of(score_batch(rows)).finish()["mean_k1"]
    alone = totals_of(score_batch(rows, without=["group_id"])).finish()["mean_k1"]
    # THEN their interval is wider by the square root of eight
    assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(math.sqrt(8), rel=0.15)
    assert grouped.low < grouped.value < grouped.high


def test_the_maximum_has_no_interval() -> None:
    metric = totals_of(score_batch(random_rows(np.random.default_rng(14), 20))).finish()["max_abs_log_ratio"]
    assert math.isnan(metric.low)
    assert math.isnan(metric.high)


def test_statistics_work_on_any_leading_shape() -> None:
    _, sums = totals_of(score_batch(rows_with_probabilities(np.random.default_rng(15)))).clusters()
    single = statistics(sums.sum(axis=0))
    stacked = statistics(np.broadcast_to(sums.sum(axis=0), (2, 3, sums.shape[1])))
    for name, value in single.items():
        np.testing.assert_array_equal(stacked[name], np.full((2, 3), value))
    # AND do not change when every cluster is there twice, which the intervals rely on
    doubled = statistics(2 * sums.sum(axis=0))
    for name, value in single.items():
        np.testing.assert_allclose(doubled[name], value, rtol=1e-12)
