"""L', L_masked and PPO's unclipped terms equal the formulas written as loops over rows."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from report_rows import Row, random_rows, score_batch, token_values

from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.summary import AuditSummary

CLIP = 0.2


def rows_with_rewards(seed: int = 0) -> list[Row]:
    """60 rows in 7 groups (one of a single row) and without a group; rewards with and without ties."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 60, "sampled", groups=6)
    for i, row in enumerate(rows):
        row["reward"] = float(rng.integers(0, 3)) / 2 if i % 2 else float(rng.random())
    rows[7]["group_id"] = "alone"
    for i in (3, 30, 31, 59):
        rows[i]["group_id"] = None
    return rows


def summarize(rows: list[Row], parts: int = 3, keep: list[bool] | None = None) -> AuditSummary:
    builder = SummaryBuilder()
    for part in np.array_split(np.arange(len(rows)), parts):
        batch = score_batch([rows[i] for i in part])
        builder.add(
            batch if keep is None else batch.append_column("keep", pa.array([keep[i] for i in part], pa.bool_()))
        )
    return builder.finish()


def baseline_of_others(rows: list[Row], i: int) -> float:
    """Mean reward of the others in the group, of all others where there is no group or nobody else in it."""
    group = rows[i]["group_id"]
    others = [r["reward"] for j, r in enumerate(rows) if j != i and group is not None and r["group_id"] == group]
    others = others or [r["reward"] for j, r in enumerate(rows) if j != i]
    return math.fsum(others) / len(others)


def advantage(rows: list[Row], i: int) -> float:
    group = rows[i]["group_id"]
    members = [r["reward"] for r in rows if r["group_id"] == group] if group else [r["reward"] for r in rows]
    return rows[i]["reward"] - math.fsum(members) / len(members)


def weight(row: Row) -> float:
    return math.fsum(v - 1 for v in token_values(row, "ratio") or [])


@pytest.mark.parametrize("parts", [1, 3, 60])
def test_the_surrogate_leaves_the_own_reward_out_of_the_baseline(parts: int) -> None:
    rows = rows_with_rewards()
    found = summarize(rows, parts).rewards
    assert found is not None
    assert found.surrogate is not None
    terms = [(row["reward"] - baseline_of_others(rows, i)) * weight(row) for i, row in enumerate(rows)]
    assert found.surrogate.mean == pytest.approx(math.fsum(terms) / len(rows), rel=1e-9)


def test_the_surrogates_interval_counts_groups() -> None:
    rows = rows_with_rewards()
    found = summarize(rows).rewards
    assert found is not None
    assert found.surrogate is not None
    terms = [(row["reward"] - baseline_of_others(rows, i)) * weight(row) for i, row in enumerate(rows)]
    mean = math.fsum(terms) / len(rows)
    clusters: dict[str, float] = {}
    for row, term in zip(rows, terms, strict=True):
        key = row["group_id"] or row["rollout_id"]
        clusters[key] = clusters.get(key, 0.0) + term - mean
    count = len(clusters)
    error = math.sqrt(math.fsum(v * v for v in clusters.values()) * count / (count - 1)) / len(rows)
    student = 2.2281388519649385  # 0.975 quantile at 10 degrees of freedom
    assert count == found.surrogate.clusters == 11
    assert found.surrogate.high - mean == pytest.approx(student * error, rel=1e-8)


def test_a_constant_added_to_all_rewards_changes_no_objective() -> None:
    rows = rows_with_rewards()
    keep = [True] * len(rows)
    shifted = [row | {"reward": row["reward"] + 5.0} for row in rows]
    a, b = summarize(rows, keep=keep).rewards, summarize(shifted, keep=keep).rewards
    assert a is not None
    assert b is not None
    assert a.surrogate is not None
    assert b.surrogate is not None
    assert a.surrogate.mean == pytest.approx(b.surrogate.mean, rel=1e-9)
    assert a.masked_objective == pytest.approx(b.masked_objective, rel=1e-9)


def test_the_surrogates_expectation_is_the_theorys_on_a_two_token_vocabulary() -> None:
    # GIVEN one-token responses in exact proportions: pi_roll (3/4, 1/4), pi_theta (1/2, 1/2), token 0 has reward 1
    rows = [{"grade": "sampled", "log_ratio": [math.log(2 / 3)], "reward": 1.0} for _ in range(300)]
    rows += [{"grade": "sampled", "log_ratio": [math.log(2.0)], "reward": 0.0} for _ in range(100)]
    found = summarize([row | {"group_id": "p"} for row in rows]).rewards
    # THEN L' is E_roll[R (rho - 1)] = 1/2 - 3/4, up to the 1/(N-1) of leaving one out
    assert found is not None
    assert found.surrogate is not None
    assert found.surrogate.mean == pytest.approx(-0.25 * 400 / 399, rel=1e-12)


def test_the_masked_objective_divides_by_all_sequences() -> None:
    rows = rows_with_rewards()
    keep = [i % 3 == 0 for i in range(len(rows))]
    found = summarize(rows, keep=keep).rewards
    assert found is not None
    terms = [advantage(rows, i) * math.fsum(token_values(row, "ratio") or []) for i, row in enumerate(rows) if keep[i]]
    assert found.masked_objective == pytest.approx(math.fsum(terms) / len(rows), rel=1e-9)


def test_stored_advantages_come_before_rewards() -> None:
    rows = rows_with_rewards()
    for i, row in enumerate(rows):
        row["advantage"] = (-1.0) ** i * 0.3 if i % 4 else None
    keep = [i % 5 > 0 for i in range(len(rows))]
    summary = summarize(rows, keep=keep)
    used = [advantage(rows, i) if row["advantage"] is None else row["advantage"] for i, row in enumerate(rows)]
    sums = [math.fsum(token_values(row, "ratio") or []) for row in rows]
    expected = math.fsum(a * s for a, s, k in zip(used, sums, keep, strict=True) if k) / len(rows)
    assert summary.rewards is not None
    assert summary.rewards.masked_objective == pytest.approx(expected, rel=1e-9)
    assert_unclipped(summary, rows, used)


def assert_unclipped(summary: AuditSummary, rows: list[Row], advantages: list[float]) -> None:
    tokens = [(r, a) for row, a in zip(rows, advantages, strict=True) for r in token_values(row, "ratio") or []]
    assert summary.ppo is not None
    assert summary.ppo.num_tokens == len(tokens)
    assert summary.ppo.negative_advantage_above == sum(r > 1 + CLIP and a < 0 for r, a in tokens) > 0
    assert summary.ppo.positive_advantage_below == sum(r < 1 - CLIP and a > 0 for r, a in tokens) > 0


def test_ppos_unclipped_tokens_are_counted_by_the_sign_of_the_groups_advantage() -> None:
    rows = rows_with_rewards()
    assert_unclipped(summarize(rows, parts=20), rows, [advantage(rows, i) for i in range(len(rows))])


def test_a_group_of_equal_rewards_has_no_sign() -> None:
    # the mean of three times 0.1 is not 0.1 in binary
    rows = [{"grade": "sampled", "group_id": "p", "log_ratio": [1.0, -1.0], "reward": 0.1} for _ in range(3)]
    ppo = summarize(rows).ppo
    assert ppo is not None
    assert (ppo.negative_advantage_above, ppo.positive_advantage_below) == (0, 0)


@pytest.mark.parametrize(
    ("rewards", "given", "expected"),
    [
        ([0.0, 0.5], None, (1.0, "assumed [0, 1]")),
        ([-1.0, 1.0], None, (2.0, "observed")),
        ([0.0, 0.5], 3.0, (3.0, "given")),
    ],
)
def test_the_rewards_range_is_given_assumed_or_observed(
    rewards: list[float], given: float | None, expected: tuple[float, str]
) -> None:
    builder = SummaryBuilder()
    builder.add(score_batch([{"grade": "sampled", "log_ratio": [0.1], "reward": r} for r in rewards]))
    summary = builder.finish(reward_range=given)
    assert summary.rewards is not None
    assert (summary.rewards.reward_range, summary.rewards.reward_range_from) == expected
    unit = SummaryBuilder()
    unit.add(score_batch([{"grade": "sampled", "log_ratio": [0.1]}]))
    one, scaled = unit.finish().bounds["all"]["sampled"], summary.bounds["all"]["sampled"]
    for name, pair in one.bounds.items():
        assert scaled.bounds[name].published == pytest.approx(expected[0] * pair.published)


def test_the_minorizer_is_the_surrogate_minus_the_smallest_bound() -> None:
    summary = summarize(rows_with_rewards())
    block = summary.bounds["all"]["sampled"]
    assert summary.rewards is not None
    assert summary.rewards.surrogate is not None
    assert block.minorizer is not None
    smallest = min(pair.published for pair in block.bounds.values())
    assert block.minorizer.published == summary.rewards.surrogate.mean - smallest
    assert block.minorizer.sharp == summary.rewards.surrogate.mean - smallest / 2


def test_one_reward_has_no_baseline_and_hence_no_surrogate() -> None:
    rewards = summarize([{"grade": "sampled", "log_ratio": [0.1], "reward": 1.0}], parts=1).rewards
    assert rewards is not None
    assert rewards.surrogate is None


def test_a_kept_row_without_an_advantage_leaves_the_masked_objective_unknown() -> None:
    rows = [{"grade": "sampled", "log_ratio": [0.1], "reward": r} for r in (1.0, 0.0, None)]
    keeping = summarize(rows, parts=1, keep=[True, True, True]).rewards
    rejecting = summarize(rows, parts=1, keep=[True, True, False]).rewards
    assert keeping is not None
    assert rejecting is not None
    assert keeping.masked_objective is None
    assert rejecting.masked_objective == pytest.approx(0.0, abs=1e-15)
