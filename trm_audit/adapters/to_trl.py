"""To TRL: the rollouts, prompts that carry their keys, and the functions that make GRPOTrainer replay them.

    replay = Replay("export/")
    GRPOTrainer(
        model,
        args=GRPOConfig(loss_type="grpo", num_generations=replay.num_generations, scale_rewards="none", ...),
        train_dataset=replay.dataset(),
        rollout_func=replay.rollouts,
        reward_funcs=replay.reward,
    ).train()

TRL repeats every prompt num_generations times and asks for one completion each. A prompt here is a key, the id of a
group, and its n-th copy is answered with the n-th rollout of that group. Token ids, masks and log-probabilities go in
as they are; no text is tokenised.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa

from trm_audit.adapters.base import ExportInfo, Target
from trm_audit.adapters.to_rows import (
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
from trm_audit.errors import BadInput, UsageError

PROMPTS_FILE = "prompts.parquet"
COLUMNS = {
    "prompt": pa.string(),
    "rollout_id": pa.string(),
    "prompt_ids": INTS,
    "completion_ids": INTS,
    "logprobs": FLOATS,
    "env_mask": pa.list_(pa.int8()),
    "reward": pa.float64(),
    "advantage": pa.float64(),
}


def write(batches: Iterator[pa.RecordBatch], folder: Path, info: ExportInfo) -> list[str]:
    """Writes `rollouts.parquet` and `prompts.parquet`; see `Target.write`.

    Raises:
        BadInput: rejected rows were dropped, rows have no group or no reward, or groups are not of one size.
    """
    refuse_dropped(info, "TRL")
    rows = TrainingRows(batches)
    if not rows.there & {"reward", "advantage"}:
        raise BadInput("there is no column 'reward'", next_step="Store the reward of each rollout.")
    names = [name for name in COLUMNS if name not in ("logprobs", "advantage", "reward") or _there(name, rows)]
    write_parquet(map(_row, rows), {name: COLUMNS[name] for name in names}, folder / ROLLOUTS_FILE, info)
    size = _group_size(rows.groups)
    prompts = ({"prompt": key} for key in rows.groups)
    write_parquet(prompts, {"prompt": pa.string()}, folder / PROMPTS_FILE)
    return [rejected(info), *_remarks(size, "reward" in rows.there, "rollout_logprobs" in rows.there)]


def _there(name: str, rows: TrainingRows) -> bool:
    return ("rollout_logprobs" if name == "logprobs" else name) in rows.there


def _row(row: TrainingRow) -> dict[str, Any]:
    """One rollout. An empty response would crash TRL: it gets one token, masked, so that any will do."""
    filler = [] if row.response else (row.prompt[-1:] or [0])
    return {
        "prompt": row.group_id,
        "rollout_id": row.rollout_id,
        "prompt_ids": row.prompt,
        "completion_ids": row.response or filler,
        "logprobs": None if row.rollout_logprobs is None else row.rollout_logprobs + [0.0] * len(filler),
        "env_mask": [int(on) for on in row.loss_mask] + [0] * len(filler),
        "reward": row.columns.get("reward"),
        "advantage": row.columns.get("advantage"),
    }


def _group_size(groups: dict[str | None, int]) -> int:
    """Rollouts of each group. Raises BadInput where TRL could not repeat every prompt equally often."""
    if None in groups:
        raise BadInput(
            f"{groups[None]} rows have no group_id, and TRL takes advantages within groups",
            next_step="Store a group_id: rollouts of one prompt share it.",
        )
    small, large = min(groups.items(), key=_size), max(groups.items(), key=_size)
    if small[1] != large[1] or small[1] < 2:
        raise BadInput(
            f"group {small[0]} has {small[1]} rollouts, group {large[0]} has {large[1]}: TRL repeats every prompt "
            "num_generations times, at least twice",
            next_step="Leave out the groups of other sizes before scoring, and filter without --drop.",
        )
    return small[1]


def _size(item: tuple[str | None, int]) -> int:
    return item[1]


def _remarks(size: int, has_reward: bool, has_logprobs: bool) -> list[str]:
    out = [
        "Set loss_type='grpo' or 'dr_grpo' ('sapo' and 'luspo' are right too): they divide by all sequences, the "
        "rejected ones included. TRL's default 'dapo', and 'bnpo', 'cispo' and 'vespo', divide by the unmasked tokens: "
        "with them the other sequences weigh more for each one rejected, and TRL has no place for a factor.",
        f"Set num_generations={size} and scale_rewards='none' for advantages of reward minus the group's mean; rewards "
        "of rejected sequences count in that mean.",
    ]
    if not has_reward:
        out.append("There is no reward; the advantages stand in, from which TRL takes the mean of the group.")
    if has_logprobs:
        out.append(
            "logprobs are the engine's. They enter TRL's loss only with use_vllm=True, which expects them after "
            "temperature and truncation (processed), and by default masks sequences by their product of ratios again."
        )
    return out


class Replay:
    """An export for TRL, as arguments of GRPOTrainer.

    Args:
        folder: what `trm-audit export --to trl` wrote.

    Attributes:
        num_generations: rollouts of each group, for GRPOConfig.
        columns: name -> values, one per rollout.

    Raises:
        BadInput: the folder holds no such export.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.columns, _ = read_export(folder)
        self._groups: dict[str, list[int]] = {}
        for at, key in enumerate(self.columns["prompt"]):
            self._groups.setdefault(key, []).append(at)
        self.num_generations = len(next(iter(self._groups.values())))

    def dataset(self) -> Any:
        """A `datasets.Dataset` of one row per group, whose `prompt` is its key."""
        return import_module("datasets").Dataset.from_dict({"prompt": list(self._groups)})

    def rollouts(self, prompts: Sequence[str], trainer: Any) -> dict[str, list[Any]]:
        """TRL's `rollout_func`: the n-th copy of a prompt gets the n-th rollout of its group.

        Args:
            prompts: of this process, each repeated num_generations times over all processes.
            trainer: whose `accelerator` says which process this is.

        Raises:
            UsageError: a prompt is no key of this export, or num_generations is another.
        """
        size = self.num_generations
        if trainer.num_generations != size:
            raise UsageError(f"num_generations is {trainer.num_generations}", next_step=f"Set num_generations={size}.")
        unknown = next((key for key in prompts if key not in self._groups), None)
        if unknown is not None:
            raise UsageError(
                f"no rollouts for the prompt {unknown!r}", next_step="Train on the dataset() of this Replay."
            )
        first = trainer.accelerator.process_index * len(prompts)
        at = [self._groups[key][(first + n) % size] for n, key in enumerate(prompts)]
        names = ("prompt_ids", "completion_ids", "env_mask", "rollout_id")
        out = {name: [self.columns[name][row] for row in at] for name in names}
        reward = self.columns.get("reward", self.columns.get("advantage", []))
        logprobs = self.columns.get("logprobs")
        lengths = [len(ids) for ids in out["completion_ids"]]
        out["logprobs"] = [
            logprobs[row] if logprobs else [float("nan")] * n for row, n in zip(at, lengths, strict=True)
        ]
        return {**out, "reward": [reward[row] for row in at]}

    def reward(self, reward: Sequence[float | None], **_: Any) -> list[float | None]:
        """TRL's reward function: what the shard says; None is a completion that TRL leaves out of the group's mean."""
        return list(reward)


TARGET = Target("trl", "rollouts and prompts for GRPOTrainer's rollout_func", write)
