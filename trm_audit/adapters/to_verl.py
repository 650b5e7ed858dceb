"""To verl: a Parquet file with the fields of a DataProto, and the function that pads them.

    from verl import DataProto
    data = DataProto.from_dict(**load("export/", tokenizer.pad_token_id, reject_by="mask"))
    data.meta_info["temperature"] = 1.0

Whether a sequence without an unmasked token counts in verl's denominator depends on `loss_agg_mode`, and `reject_by`
follows it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trm_audit.adapters.base import ExportInfo, Target
from trm_audit.adapters.to_rows import (
    FLAGS,
    FLOATS,
    INTS,
    ROLLOUTS_FILE,
    Reject,
    TrainingRow,
    TrainingRows,
    dropped,
    padded,
    read_export,
    refuse_dropped,
    rejected,
    write_parquet,
)

COLUMNS = {
    "rollout_id": pa.string(),
    "uid": pa.string(),
    "prompts": INTS,
    "responses": INTS,
    "response_mask": FLAGS,
    "policy_mask": FLAGS,
    "rollout_log_probs": FLOATS,
    "old_log_probs": FLOATS,
    "advantages": pa.float64(),
    "reward": pa.float64(),
}
OPTIONAL = {"rollout_log_probs": "rollout_logprobs", "old_log_probs": "trainer_logprobs", "reward": "reward"}


def write(batches: Iterator[pa.RecordBatch], folder: Path, info: ExportInfo) -> list[str]:
    """Writes `rollouts.parquet`; see `Target.write`. Raises BadInput if a kept row has no advantage."""
    rows = TrainingRows(batches, must=("advantage",))
    columns = {name: kind for name, kind in COLUMNS.items() if OPTIONAL.get(name, "advantage") in rows.there}
    write_parquet(map(_row, rows), columns, folder / ROLLOUTS_FILE, info)
    return [
        rejected(info),
        "loss_agg_mode seq-mean-token-sum, seq-mean-token-mean and seq-mean-token-sum-norm: load(..., "
        "reject_by='mask'). They divide by the sequences of the mini-batch, the rejected ones included, if agg_loss is "
        "given global_batch_size, as verl's ppo_loss does.",
        "token-mean, or agg_loss without global_batch_size: load(..., reject_by='advantage'). These divide by what the "
        "mask leaves, so the mask stays and the advantages of rejected sequences are 0.",
    ]


def _row(row: TrainingRow) -> dict[str, Any]:
    return {
        "rollout_id": row.rollout_id,
        "uid": row.group_id if row.group_id is not None else row.rollout_id,
        "prompts": row.prompt,
        "responses": row.response,
        "response_mask": row.loss_mask,
        "policy_mask": row.policy_mask,
        "rollout_log_probs": row.rollout_logprobs,
        "old_log_probs": row.trainer_logprobs,
        "advantages": row.advantage,
        "reward": row.reward,
    }


def load(
    folder: str | os.PathLike[str],
    pad_token_id: int,
    *,
    reject_by: Reject,
    start: int = 0,
    count: int | None = None,
    prompt_length: int | None = None,
    response_length: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Arguments of `DataProto.from_dict`.

    Args:
        folder: what `trm-audit export --to verl` wrote.
        pad_token_id: fills prompts on the left and responses on the right.
        reject_by: "mask" for the seq-mean modes of `loss_agg_mode`, "advantage" for token-mean.
        start, count: which rows; all without `count`.
        prompt_length, response_length: P and R; the longest decides where None.

    Returns:
        `tensors`: prompts [B, P], responses [B, R], input_ids, attention_mask, position_ids [B, P + R], response_mask
        [B, R], int64; advantages, returns, and if they are there rollout_log_probs, old_log_probs (the trainer's),
        token_level_scores (the reward at the last token, NaN for null) [B, R], float32. `non_tensors`: uid, rollout_id.

    Raises:
        BadInput: the folder holds no such export.
        UsageError: a sequence is longer than allowed.
    """
    import torch

    rows, info = read_export(folder, start, count)
    if reject_by == "advantage":
        refuse_dropped(info, "a mean over tokens")
    arrays = _sequences(rows, pad_token_id, prompt_length, response_length)
    width = arrays["responses"].shape[1]
    loss_mask = padded(rows["response_mask"], 0, np.int64, length=width)
    policy_mask = padded(rows["policy_mask"], 0, np.int64, length=width)
    arrays["response_mask"] = loss_mask if reject_by == "mask" else policy_mask
    each = np.array(rows["advantages"])[:, None] * dropped(info)
    arrays["advantages"] = (each * loss_mask).astype(np.float32)
    arrays["returns"] = arrays["advantages"].copy()
    for name in ("rollout_log_probs", "old_log_probs"):
        if name in rows:
            arrays[name] = padded(rows[name], 0.0, np.float32, length=width)
    if "reward" in rows:
        arrays["token_level_scores"] = np.zeros(loss_mask.shape, dtype=np.float32)
        last = [max(0, len(ids) - 1) for ids in rows["responses"]]
        arrays["token_level_scores"][np.arange(len(last)), last] = rows["reward"]
    names = {name: np.array(rows[name], dtype=object) for name in ("uid", "rollout_id")}
    return {"tensors": {name: torch.from_numpy(array) for name, array in arrays.items()}, "non_tensors": names}


def _sequences(
    rows: dict[str, list[Any]], pad_token_id: int, prompt_length: int | None, response_length: int | None
) -> dict[str, NDArray[Any]]:
    """Token ids, attention mask and positions, padded as verl pads them."""
    prompts = padded(rows["prompts"], pad_token_id, np.int64, left=True, length=prompt_length)
    responses = padded(rows["responses"], pad_token_id, np.int64, length=response_length)
    before = padded([[1] * len(ids) for ids in rows["prompts"]], 0, np.int64, left=True, length=prompts.shape[1])
    after = padded([[1] * len(ids) for ids in rows["responses"]], 0, np.int64, length=responses.shape[1])
    mask = np.concatenate([before, after], axis=1)
    return {
        "prompts": prompts,
        "responses": responses,
        "input_ids": np.concatenate([prompts, responses], axis=1),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
    }


TARGET = Target("verl", "a Parquet file with the fields of a DataProto", write)
