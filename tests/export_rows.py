"""A small training folder for tests of exports: real rollouts of the tiny model, scored, and some of them rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from some_rollouts import write_shard

from trm_audit.criteria.thresholds import Criteria
from trm_audit.pipeline.filter import FilterOptions, filter_scores
from trm_audit.pipeline.score import ScoreOptions, score

TINY = Path(__file__).parent.parent / "sample_data" / "tiny"
GROUPS = ("v170/sum-14", "v190/sum-10", "v80/sum-01")
NAMES = ["rollout_id", "group_id", "prompt_ids", "response_ids", "response_mask", "rollout_logprobs", "reward"]


def some_rollouts() -> list[dict[str, Any]]:
    """16 rollouts in groups of 4: sums, one group with a calculator's tokens, and in it one empty response."""
    names = [*NAMES, "temperature", "logprobs_mode", "policy_version", "finish_reason"]
    rows: list[dict[str, Any]] = []
    for k in range(3):
        rows += pq.read_table(TINY / "rollouts" / f"rollouts-0000{k}.parquet", columns=names).to_pylist()
    with_tool = next(row["group_id"] for row in rows if not all(row["response_mask"]))
    chosen = [row for group in (*GROUPS, with_tool) for row in rows if row["group_id"] == group]
    chosen[-1].update(response_ids=[], response_mask=[], rollout_logprobs=[], finish_reason="length")
    return chosen


def training_folder(folder: Path, *, drop: bool = False, rows: list[dict[str, Any]] | None = None) -> Path:
    """Scores and filters rollouts (`some_rollouts` if None): a token with abs(log ratio) above 0.2 rejects."""
    write_shard(folder / "rollouts" / "part-0.parquet", some_rollouts() if rows is None else rows)
    score([str(folder / "rollouts")], str(folder / "scores"), ScoreOptions(model=TINY / "model"))
    options = FilterOptions(Criteria(delta_max=0.2, max_of="abs_log_ratio"), drop=drop)
    filter_scores([str(folder / "scores")], str(folder / "train"), options)
    return folder / "train"


def table(train: Path) -> list[dict[str, Any]]:
    """Rows of a training folder."""
    return pq.read_table(train / "data").to_pylist()
