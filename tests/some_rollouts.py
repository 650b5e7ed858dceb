"""Rollouts for tests of files and streams: rows from a seed, near to a random model, of each grade of evidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trm_audit.shards.rollout_writer import LogitsTableWriter, write_rollout_table
from trm_audit.shards.schema import ROLLOUT_COLUMNS

VOCAB = 32
Row = dict[str, Any]


def logits_of(index: int, length: int) -> np.ndarray:
    """[length, VOCAB] float32: what rollout `index` was drawn from; nearly uniform, as a random model's are."""
    return np.random.default_rng([index, 1]).normal(scale=0.3, size=(length, VOCAB)).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """By the definition, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def rollout(index: int, grade: str = "sampled", length: int | None = None, **more: Any) -> Row:
    """One row. Full logits of an exact one are under `logits`, which `write_shard` puts into a side file."""
    rng = np.random.default_rng([index, 0])
    own = int(rng.integers(1, 9))
    length = own if length is None else length
    logits = logits_of(index, length)
    logprobs = log_softmax(logits)
    ids = rng.integers(0, VOCAB, length)
    row: Row = {
        "rollout_id": f"r{index:04d}",
        "group_id": f"g{index // 4:03d}",
        "prompt_ids": rng.integers(0, VOCAB, int(rng.integers(1, 5))).tolist(),
        "response_ids": ids.tolist(),
        "rollout_logprobs": logprobs[np.arange(length), ids].tolist(),
        "reward": float(rng.integers(0, 2)),
    }
    if grade == "exact":
        row["logits"] = logits
    if grade == "interval":
        order = np.argsort(-logprobs, axis=1)[:, :5]
        row["rollout_topk_ids"] = order.tolist()
        row["rollout_topk_logprobs"] = np.take_along_axis(logprobs, order, 1).tolist()
    return {**row, **more}


def as_table(rows: Sequence[Row]) -> pa.Table:
    """Rows as a table: columns of the schema in its types, others as they come, null where a row has none."""
    names = dict.fromkeys(name for row in rows for name in row if name != "logits")
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        per_token = name == "policy_version" and any(isinstance(value, list) for value in values)
        known = name in ROLLOUT_COLUMNS and not per_token
        columns[name] = pa.array(values, ROLLOUT_COLUMNS[name].type if known else None)
    return pa.table(columns)


def write_shard(file: Path, rows: Sequence[Row]) -> Path:
    """A rollout shard, with a side file for the rows that bring logits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with_logits = [row for row in rows if "logits" in row]
    side = f"logits-{file.stem}.parquet"
    if with_logits:
        with LogitsTableWriter(file.parent / side, "float32") as writer:
            for row in with_logits:
                writer.add(row["rollout_id"], row["logits"])
    write_rollout_table(file, as_table(rows), logits=[side] if with_logits else [])
    return file


def write_shards(folder: Path, shards: int, rows: int, grade: str = "sampled", **more: Any) -> Path:
    """A folder of shards `part-0.parquet`, ... of so many rows each, numbered throughout."""
    for k in range(shards):
        write_shard(folder / f"part-{k}.parquet", [rollout(i, grade, **more) for i in range(k * rows, (k + 1) * rows)])
    return folder
