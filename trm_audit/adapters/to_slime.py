"""To slime and miles: one `.pt` for `--load-debug-rollout-data`, with the samples as they dump them themselves.

    --load-debug-rollout-data export/rollout_{rollout_id}.pt --debug-train-only --num-rollout 1

It holds dictionaries, lists and numbers alone, so that torch reads it with weights_only. Samples of a group stand
together, as slime takes rewards by position. Texts are left empty: nothing there trains on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from trm_audit.adapters.base import ExportInfo, Target
from trm_audit.adapters.to_rows import TrainingRow, TrainingRows, refuse_dropped, rejected
from trm_audit.errors import BadInput

FILE = "rollout_0.pt"


def write(batches: Iterator[pa.RecordBatch], folder: Path, info: ExportInfo) -> list[str]:
    """Writes `rollout_0.pt`; see `Target.write`. The file is made in memory, as slime makes it.

    Raises:
        BadInput: rejected rows were dropped, or a row has no reward.
    """
    import torch

    refuse_dropped(info, "slime")
    rows = TrainingRows(batches)
    if not rows.there & {"reward", "advantage"}:
        raise BadInput("there is no column 'reward'", next_step="Store the reward of each rollout.")
    numbers: dict[str, int] = {}
    samples = [_sample(row, index, numbers, "reward" in rows.there) for index, row in enumerate(rows)]
    samples.sort(key=_group_index)  # stable
    for index, sample in enumerate(samples):
        sample["index"] = index
    torch.save({"rollout_id": 0, "metadata": {}, "samples": samples}, folder / FILE)
    return [rejected(info), *_remarks(rows)]


def _group_index(sample: dict[str, Any]) -> int:
    return int(sample["group_index"])


def _sample(row: TrainingRow, index: int, numbers: dict[str, int], has_reward: bool) -> dict[str, Any]:
    """What slime's `Sample.to_dict` gives; one masked token stands in for an empty response."""
    group = row.group_id if row.group_id is not None else f"row {index}"
    filler = [] if row.response else (row.prompt[-1:] or [0])
    reward = row.reward if has_reward else row.columns.get("advantage")
    if reward is None:
        raise BadInput(
            "has no reward, and slime takes the mean of each group, the rejected rows included",
            place=f"rollout_id={row.rollout_id}",
            next_step="Store the reward of each rollout.",
        )
    logprobs = None if row.rollout_logprobs is None else row.rollout_logprobs + [0.0] * len(filler)
    about = {"rollout_id": row.rollout_id, "group_id": row.group_id, "keep": row.keep, "reason": row.columns["reason"]}
    return {
        "group_index": numbers.setdefault(group, len(numbers)),
        "index": index,
        "prompt": "",
        "tokens": row.prompt + row.response + filler,
        "response": "",
        "response_length": len(row.response) + len(filler),
        "label": None,
        "reward": reward,
        "loss_mask": [int(on) for on in row.loss_mask] + [0] * len(filler),
        "weight_versions": _versions(row.columns.get("policy_version")),
        "rollout_log_probs": logprobs,
        "remove_sample": False,
        "status": "truncated" if row.columns.get("finish_reason") == "length" else "completed",
        "metadata": {"trm_audit": {**about, "advantage": row.advantage}},
    }


def _versions(version: int | list[int] | None) -> list[str]:
    """Each once, in the order of the tokens."""
    if version is None:
        return []
    return [str(one) for one in (dict.fromkeys(version) if isinstance(version, list) else [version])]


def _remarks(rows: TrainingRows) -> list[str]:
    sizes = [size for group, size in rows.groups.items() if group is not None] + [1] * rows.groups.get(None, 0)
    total = sum(sizes)
    out = [
        "slime and miles average each sample over its own unmasked tokens (0 for a rejected one) and divide by the "
        "number of samples: N, as it should be. Leave --calculate-per-token-loss off: it divides by unmasked tokens, "
        "and a sample has no place for a factor.",
        f"Load it with --load-debug-rollout-data DIR/rollout_{{rollout_id}}.pt; {total} samples are one step at "
        f"--global-batch-size {total}.",
    ]
    if min(sizes) == max(sizes):
        out.append(
            f"Set --n-samples-per-prompt {sizes[0]} --rollout-batch-size {len(sizes)}: slime subtracts the mean of "
            "each group from the rewards; add --disable-grpo-std-normalization for the advantages of the shard."
        )
    else:
        out.append(
            f"Groups have {min(sizes)} to {max(sizes)} samples: slime would take all of them for one group. Pass "
            "--disable-rewards-normalization, and set the advantage as the reward "
            "(sample['metadata']['trm_audit']['advantage'])."
        )
    if "reward" not in rows.there:
        out.append("There is no reward; the advantages stand in: pass --disable-rewards-normalization.")
    return out


TARGET = Target("slime", "one .pt for --load-debug-rollout-data (slime, miles)", write)
