"""What a scoring run would do and how long it would take, without writing anything."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from trm_audit.pipeline.progress import Silent
from trm_audit.pipeline.rollouts import RolloutLoop
from trm_audit.pipeline.score import chosen_shards
from trm_audit.pipeline.selection import Selection, select
from trm_audit.pipeline.trainer import ScoreOptions, Trainer
from trm_audit.pipeline.worker import settle
from trm_audit.shards.read import Shard, find_shards

DRY_RUN_ROWS = 8


@dataclass(frozen=True)
class DryRun:
    """What a run would do, and how long it would take by the speed of a few rows.

    Attributes:
        shards, rows, num_tokens: of the run (tokens of responses, by the footers).
        logits_bytes: of side files that would be read.
        devices: that would score side by side.
        tokens_per_second: of all devices, by the speed of one on `DRY_RUN_ROWS` rows; seconds: for all tokens.
    """

    shards: int
    rows: int
    num_tokens: int
    logits_bytes: int
    devices: int
    tokens_per_second: float
    seconds: float


def dry_run(inputs: Sequence[str], options: ScoreOptions) -> DryRun:
    """Counts what `score` would do and times a few rows of it. Writes nothing.

    Raises:
        AuditError: as `score` would.
    """
    options.check()
    found = find_shards(inputs, "rollouts", options.columns)
    if found.bad:
        raise found.bad[0]
    selection = select(found.shards, options.columns, options.sample, options.limit)
    if selection.bad:
        raise selection.bad[0]
    part, parts = options.part
    shards = chosen_shards(found.shards, selection, options)[part - 1 :: parts]
    num_tokens = sum(shard.num_tokens * selection.rows[shard.name] // max(shard.num_rows, 1) for shard in shards)
    devices = max(1, min(len(options.devices), len(shards)))
    speed = devices * _speed_of_one(shards, options, devices, selection)
    files = {file for shard in shards for file in shard.logits}
    return DryRun(
        shards=len(shards),
        rows=sum(selection.rows[shard.name] for shard in shards),
        num_tokens=num_tokens,
        logits_bytes=sum(file.stat().st_size for file in files),
        devices=devices,
        tokens_per_second=speed,
        seconds=num_tokens / speed,
    )


def _speed_of_one(shards: Sequence[Shard], options: ScoreOptions, devices: int, selection: Selection) -> float:
    """Tokens per second of one of the devices, with its share of the cores; inf without tokens."""
    alone = options.on_one_device()
    if devices > 1:
        settle(alone, devices)
    trainer = Trainer(alone)
    speeds = (_speed(shard, trainer, selection) for shard in shards)
    return next((one for one in speeds if one > 0), float("inf"))


class _Nowhere:
    """A sink for rows that are only timed."""

    def write(self, batch: pa.RecordBatch) -> None: ...

    def close(self, counts: Mapping[str, object]) -> None: ...


def _speed(shard: Shard, trainer: Trainer, selection: Selection) -> float:
    few = Selection({shard.name: min(DRY_RUN_ROWS, selection.rows[shard.name])}, selection.duplicates, selection.sample)
    for _ in range(2):  # the first pass warms up
        loop = RolloutLoop(trainer, few, _Nowhere(), Silent(), None)
        began = time.monotonic()
        loop.shard(shard)
        seconds = time.monotonic() - began
    counted = loop.counts.to_json()["num_tokens"]
    return float(str(counted)) / max(seconds, 1e-9)
