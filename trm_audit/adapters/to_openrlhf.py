"""To OpenRLHF: a Parquet file with the fields of an Experience, and the function that makes one of each row.

    from openrlhf.trainer.ppo_utils.experience import Experience
    for fields in experiences("export/"):
        replay_buffer.append(Experience(**fields))

OpenRLHF keeps per-token values on the axis of next tokens: entry t belongs to token t + 1, so they are one shorter than
the sequence. Its loss is a mean over unmasked tokens, or over sequences that have one, and 0 / 0 in some versions where
a micro-batch has none: so the mask is that of the sampled tokens, and a rejected sequence has an advantage of 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from trm_audit.adapters.base import ExportInfo, Target
from trm_audit.adapters.to_rows import (
    FLAGS,
    FLOATS,
    INTS,
    ROLLOUTS_FILE,
    TrainingRow,
    TrainingRows,
    read_export,
    refuse_dropped,
    rejected,
    write_parquet,
)

COLUMNS = {
    "rollout_id": pa.string(),
    "group_id": pa.string(),
    "sequences": INTS,
    "action_mask": FLAGS,
    "keep": pa.bool_(),
    "action_log_probs": FLOATS,
    "rollout_log_probs": FLOATS,
    "advantages": FLOATS,
    "reward": pa.float64(),
    "response_length": pa.int32(),
    "truncated": pa.bool_(),
}
OPTIONAL = {"rollout_log_probs": "rollout_logprobs", "reward": "reward"}


def write(batches: Iterator[pa.RecordBatch], folder: Path, info: ExportInfo) -> list[str]:
    """Writes `rollouts.parquet`; see `Target.write`.

    Raises:
        BadInput: a kept row has no advantage or no log-probabilities of the trainer.
    """
    refuse_dropped(info, "OpenRLHF, which divides by tokens,")
    rows = TrainingRows(batches, must=("advantage", "trainer_logprobs"))
    columns = {name: kind for name, kind in COLUMNS.items() if OPTIONAL.get(name, "advantage") in rows.there}
    write_parquet(map(_row, rows), columns, folder / ROLLOUTS_FILE, info)
    return [
        rejected(info),
        "OpenRLHF's PolicyLoss divides by the unmasked tokens, or by the sequences that have one, in some versions of "
        "a micro-batch, and by 0 if there are none. So the mask of a rejected sequence stays, and its advantages are "
        "0: its policy loss is 0, its tokens count.",
        "A KL loss and an entropy bonus still see rejected sequences: leave both off, or they train on them.",
    ]


def _row(row: TrainingRow) -> dict[str, Any]:
    out = {
        "rollout_id": row.rollout_id,
        "group_id": row.group_id,
        "sequences": row.prompt + row.response,
        "action_mask": row.flags(row.policy_mask)[1:],
        "keep": row.keep,
        "action_log_probs": row.spread(row.trainer_logprobs)[1:],
        "advantages": row.spread(row.advantage if row.keep else 0.0)[1:],
        "reward": row.reward,
        "response_length": len(row.response),
        "truncated": row.columns.get("finish_reason") == "length",
    }
    return out if row.rollout_logprobs is None else {**out, "rollout_log_probs": row.spread(row.rollout_logprobs)[1:]}


def experiences(
    folder: str | os.PathLike[str], *, start: int = 0, count: int | None = None
) -> Iterator[dict[str, Any]]:
    """Fields of one Experience per row, a batch of one each.

    Args:
        folder: what `trm-audit export --to openrlhf` wrote.
        start, count: which rows; all without `count`.

    Yields:
        sequences, attention_mask [1, T]; action_mask [1, T - 1] bool; action_log_probs (the trainer's),
        rollout_log_probs if they are there, advantages, returns [1, T - 1] float32; response_length, total_length,
        truncated and, if they are there, rewards [1] (NaN for null); info with the reward.

    Raises:
        BadInput: the folder holds no such export.
    """
    import torch

    rows, _ = read_export(folder, start, count)
    for at, sequence in enumerate(rows["sequences"]):
        fields: dict[str, Any] = {
            "sequences": torch.tensor([sequence], dtype=torch.int64),
            "attention_mask": torch.ones((1, len(sequence)), dtype=torch.int64),
            "action_mask": torch.tensor([rows["action_mask"][at]], dtype=torch.bool),
            "advantages": torch.tensor([rows["advantages"][at]], dtype=torch.float32),
            "response_length": torch.tensor([rows["response_length"][at]]),
            "total_length": torch.tensor([len(sequence)]),
            "truncated": torch.tensor([rows["truncated"][at]]),
            "info": {},
        }
        for name in ("action_log_probs", "rollout_log_probs"):
            if name in rows:
                fields[name] = torch.tensor([rows[name][at]], dtype=torch.float32)
        if "reward" in rows:
            fields["rewards"] = torch.tensor([_number(rows["reward"][at])], dtype=torch.float32)
            fields["info"] = {"reward": fields["rewards"].clone()}
        yield {**fields, "returns": fields["advantages"].clone()}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


TARGET = Target("openrlhf", "a Parquet file with the fields of an Experience", write)
