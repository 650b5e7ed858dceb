"""To prime-rl: a Parquet file with the fields of a TrainingSample, and the function that makes the samples.

    from prime_rl.transport.types import TrainingBatch, TrainingSample
    batch = TrainingBatch(examples=list(samples("export/", TrainingSample, env_name="math")), step=1)
    (step_folder / "rollouts.bin").write_bytes(msgspec.msgpack.encode(batch))

prime-rl sends these as MessagePack arrays, whose meaning is the order of the fields of the version that reads them. So
nothing is encoded here: the installed class is filled by name, and encodes itself. Its loss is a sum over the unmasked
tokens of a step, divided by their number, and has a term without an advantage: so rejected sequences are masked, and a
factor puts their tokens back into the denominator.
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
from trm_audit.errors import UsageError

COLUMNS = {
    "rollout_id": pa.string(),
    "group_id": pa.string(),
    "token_ids": INTS,
    "num_prompt_tokens": pa.int32(),
    "mask": FLAGS,
    "policy_mask": FLAGS,
    "logprobs": FLOATS,
    "temperature": pa.float64(),
    "advantage": pa.float64(),
    "reward": pa.float64(),
}


def write(batches: Iterator[pa.RecordBatch], folder: Path, info: ExportInfo) -> list[str]:
    """Writes `rollouts.parquet`; see `Target.write`.

    Raises:
        BadInput: a kept row has no advantage, or no log-probabilities of the engine.
    """
    refuse_dropped(info, "prime-rl, which divides by tokens,")
    rows = TrainingRows(batches, must=("advantage", "rollout_logprobs"))
    write_parquet(map(_row, rows), COLUMNS, folder / ROLLOUTS_FILE, info)
    return [
        rejected(info),
        "prime-rl divides by the unmasked tokens of a step. samples() multiplies the loss of the others by unmasked "
        "over sampled tokens of the rows that it is asked for, through rl_weights where the version has them and else "
        "through the advantages: ask for the rows of one step at a time.",
    ]


def _row(row: TrainingRow) -> dict[str, Any]:
    temperature = row.columns.get("temperature")
    return {
        "rollout_id": row.rollout_id,
        "group_id": row.group_id,
        "token_ids": row.prompt + row.response,
        "num_prompt_tokens": len(row.prompt),
        "mask": row.flags(row.loss_mask),
        "policy_mask": row.flags(row.policy_mask),
        "logprobs": row.spread(row.rollout_logprobs),
        "temperature": 1.0 if temperature is None else temperature,
        "advantage": row.advantage,
        "reward": row.reward,
    }


def samples(
    folder: str | os.PathLike[str],
    sample_class: Any,
    *,
    env_name: str = "trm-audit",
    start: int = 0,
    count: int | None = None,
) -> Iterator[Any]:
    """Objects of prime-rl's TrainingSample, one per row of a step.

    Args:
        folder: what `trm-audit export --to prime-rl` wrote.
        sample_class: `prime_rl.transport.types.TrainingSample`, of flat sequences (`token_ids`) or of prompt and
            completion.
        env_name: for the fields and metrics that prime-rl keeps by environment.
        start, count: which rows; all without `count`.

    Raises:
        BadInput: the folder holds no such export.
        UsageError: the class needs fields that this release does not know.
    """
    rows, _ = read_export(folder, start, count)
    unmasked, sampled = (sum(map(sum, rows[name])) for name in ("mask", "policy_mask"))
    scale = unmasked / max(1, sampled)
    names = _fields(sample_class)
    for at in range(len(rows["token_ids"])):
        row = {name: values[at] for name, values in rows.items()}
        fields = _values(row, env_name, scale, "rl_weights" in names)
        yield sample_class(**{name: value for name, value in fields.items() if name in names})


def _fields(sample_class: Any) -> set[str]:
    """The fields that a class of msgspec has. Raises UsageError if it needs one that is not known here."""
    names: tuple[str, ...] = sample_class.__struct_fields__
    needed = names[: len(names) - len(sample_class.__struct_defaults__)]
    unknown = sorted(set(needed) - set(_values({"token_ids": [], "num_prompt_tokens": 0}, "", 1.0, True)))
    if "TrainingAdvantage" in str(sample_class.__annotations__.get("advantages", "")):
        unknown.append("advantages (as TrainingAdvantage)")
    if unknown:
        raise UsageError(
            f"this prime-rl's TrainingSample needs {', '.join(unknown)}, which is not known here",
            next_step="Fill the class from rollouts.parquet by hand, or use another version of prime-rl.",
        )
    return set(names)


def _values(row: dict[str, Any], env_name: str, scale: float, weights: bool) -> dict[str, Any]:
    """Every field that a version of TrainingSample has had and that is known here, by name."""
    ids, mask, at = row["token_ids"], row.get("mask", []), row["num_prompt_tokens"]
    logprobs = row.get("logprobs", [])
    temperatures = [row.get("temperature", 1.0)] * len(ids)
    advantage = (row.get("advantage") or 0.0) * (1.0 if weights else scale)
    return {
        "token_ids": ids,
        "mask": mask,
        "logprobs": logprobs,
        "temperatures": temperatures,
        "advantages": [0.0] * at + [advantage] * (len(ids) - at),
        "rl_weights": None if scale == 1.0 else [scale if on else 0.0 for on in mask],
        "prompt_ids": ids[:at],
        "prompt_mask": mask[:at],
        "completion_ids": ids[at:],
        "completion_mask": mask[at:],
        "completion_logprobs": logprobs[at:],
        "completion_temperatures": temperatures[at:],
        "advantage": advantage,
        "reward": row.get("reward"),
        "env_name": env_name,
    }


TARGET = Target("prime-rl", "a Parquet file with the fields of a TrainingSample", write)
