"""To NeMo-RL: JSONL with the fields of its own `train_data_step*.jsonl`, and the function that makes loss data of it.

    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    data = BatchedDataDict(load("export/", tokenizer.pad_token_id, reject_by="mask"))
    policy.train(data, loss_fn)

A line is a batch of one, as NeMo-RL logs it. Sequences have their full length, the leading position included: entry t
belongs to token t, and the loss leaves out the first. Rejected sequences have `sample_loss_mask` 1 and a token mask of
zeros: with a sample mask of 0 they would leave the denominator.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trm_audit.adapters.base import ExportInfo, Target
from trm_audit.adapters.to_rows import Reject, TrainingRow, TrainingRows, dropped, padded, refuse_dropped, rejected
from trm_audit.errors import BadInput, UsageError

FILE = "train_data_step0.jsonl"
LISTS = ("token_ids", "token_loss_mask", "policy_mask", "advantages", "generation_logprobs", "prev_logprobs")


def write(batches: Iterator[pa.RecordBatch], folder: Path, info: ExportInfo) -> list[str]:
    """Writes `train_data_step0.jsonl`; see `Target.write`.

    Raises:
        BadInput: a kept row has no advantage, or no log-probabilities of the engine or of the trainer.
    """
    rows = TrainingRows(batches, must=("advantage", "rollout_logprobs", "trainer_logprobs"))
    with (folder / FILE).open("w", encoding="utf-8") as out:
        for index, row in enumerate(rows):
            out.write(json.dumps({**_line(row, info), "idx": index}) + "\n")
    return [
        rejected(info),
        "token_level_loss: false: load(..., reject_by='mask'). Each sequence is averaged over its own unmasked tokens, "
        "and the sum divided by sum(sample_mask), which is N here.",
        "token_level_loss: true: load(..., reject_by='advantage'). It divides by unmasked tokens, so the mask stays "
        "and the advantages of rejected sequences are 0; set reference_policy_kl_penalty: 0, which still sees them.",
    ]


def _line(row: TrainingRow, info: ExportInfo) -> dict[str, Any]:
    ids = row.prompt + row.response
    return {
        "token_ids": [ids],
        "input_lengths": [len(ids)],
        "token_loss_mask": [[int(on) for on in row.flags(row.loss_mask)]],
        "policy_mask": [[int(on) for on in row.flags(row.policy_mask)]],
        "sample_loss_mask": [1.0],
        "advantages": [row.spread(row.advantage)],
        "generation_logprobs": [row.spread(row.rollout_logprobs)],
        "prev_logprobs": [row.spread(row.trainer_logprobs)],
        "rewards": [row.reward],
        "rollout_id": [row.rollout_id],
        "group_id": [row.group_id],
        "n_total": [info.n_total],
        "n_kept": [info.n_kept],
        "num_rows": [info.num_rows],
    }


def load(
    folder: str | os.PathLike[str],
    pad_token_id: int,
    *,
    reject_by: Reject,
    start: int = 0,
    count: int | None = None,
) -> dict[str, Any]:
    """What ClippedPGLossFn and the policy's `train` take, as a dictionary of tensors.

    Args:
        folder: what `trm-audit export --to nemo-rl` wrote.
        pad_token_id: fills sequences on the right.
        reject_by: "mask" for token_level_loss: false, "advantage" for true.
        start, count: which rows; all without `count`.

    Returns:
        input_ids [B, S], input_lengths [B] int64; token_mask, advantages, generation_logprobs, prev_logprobs [B, S]
        and sample_mask [B] float32.

    Raises:
        BadInput: the folder holds no such export.
        UsageError: there are no rows from `start` on.
    """
    import torch

    lines = _read(Path(folder) / FILE)[start : None if count is None else start + count]
    if not lines:
        raise UsageError(f"there are no rows from {start} on", place=str(folder))
    rows = {name: [line[name][0] for line in lines] for name in LISTS}
    info = ExportInfo(*(lines[0][name][0] for name in ("n_total", "n_kept", "num_rows")))
    if reject_by == "advantage":
        refuse_dropped(info, "a mean over tokens")
    loss_mask = padded(rows["token_loss_mask"], 0, np.float32)
    arrays = {
        "input_ids": padded(rows["token_ids"], pad_token_id, np.int64),
        "input_lengths": np.array([len(ids) for ids in rows["token_ids"]], dtype=np.int64),
        "token_mask": loss_mask if reject_by == "mask" else padded(rows["policy_mask"], 0, np.float32),
        "sample_mask": np.array([line["sample_loss_mask"][0] for line in lines], dtype=np.float32),
        "advantages": np.float32(dropped(info)) * padded(rows["advantages"], 0.0, np.float32) * loss_mask,
        "generation_logprobs": padded(rows["generation_logprobs"], 0.0, np.float32),
        "prev_logprobs": padded(rows["prev_logprobs"], 0.0, np.float32),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise BadInput("is not there", place=str(file), next_step="Give the folder that trm-audit export wrote.")
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


TARGET = Target("nemo-rl", "JSONL with the fields of train_data_step*.jsonl", write)
