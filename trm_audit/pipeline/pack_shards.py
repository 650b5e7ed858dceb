"""Packing shards one after another into an output folder: each is published whole, its full logits before it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from trm_audit.engine.loading import pick_device
from trm_audit.engine.packing import copy_loss
from trm_audit.errors import BadInput, OutputError, RowError
from trm_audit.pipeline.pack_options import PackCounts, PackOptions, PackResult
from trm_audit.pipeline.pack_rows import Packer, Side, changes_stage
from trm_audit.pipeline.progress import Progress
from trm_audit.pipeline.rollouts import stored_logits
from trm_audit.pipeline.selection import Selection, shard_fingerprint
from trm_audit.rollout import Sampling
from trm_audit.shards import schema
from trm_audit.shards.logits_index import index_files
from trm_audit.shards.publish import OutputFolder, sync_file, sync_folder
from trm_audit.shards.read import Shard, read_batches, rows_at_once
from trm_audit.shards.rollout_writer import LogitsTableWriter
from trm_audit.shards.rows import RowRules, read_rows
from trm_audit.shards.write import ParquetSink, head

if TYPE_CHECKING:
    from trm_audit.shards.logits import StoredLogits

BATCH_BYTES = 1 << 20  # columns of one batch; what is kept of their full logits takes up to a hundred times as much
SAMPLING = ("temperature", "top_p", "top_k", "logprobs_mode")


class ShardPacker:
    """Packs shards into a folder.

    Args:
        options: settings.
        selection: rows, all of them, and names seen twice.
        folder: where to.
        watch: who watches.
        result: counts.
    """

    def __init__(
        self, options: PackOptions, selection: Selection, folder: OutputFolder, watch: Progress, result: PackResult
    ) -> None:
        self._options, self._selection, self._folder = options, selection, folder
        self._watch, self._result, self._device = watch, result, pick_device(options.device)
        self._sides = folder.path / "logits"

    def pack(self, shards: Sequence[Shard]) -> None:
        """Packs those that are not there yet."""
        began, names = time.monotonic(), [shard.name for shard in shards]
        self._folder.begin(names)
        self._clear_sides(shards)
        left = []
        for shard in shards:
            run = str(self._folder.run["fingerprint"])
            fingerprint = shard_fingerprint(run, shard, self._selection.rows[shard.name])
            if self._folder.is_done(shard.name, fingerprint) and not self._lacks_side(shard):
                counts = self._folder.manifest()[shard.name]["counts"]
                assert isinstance(counts, dict)
                self._result.add(counts)
                self._result.done += 1
            else:
                left.append((shard, fingerprint))
        self._watch.start(sum(shard.num_tokens for shard, _ in left))
        bad = {shard.name for shard, fingerprint in left if not self._publish(shard, fingerprint)}
        self._result.bad_shards += len(bad)
        self._result.seconds = time.monotonic() - began
        whole = {"fingerprint": self._folder.run["fingerprint"], **self._result.to_json()}
        self._result.complete = self._folder.finish([name for name in names if name not in bad], whole)

    def _side(self, shard: Shard) -> Path:
        return self._sides / f"logits-{shard.name}"

    def _writes_side(self, shard: Shard) -> bool:
        return self._options.to.kind == "q16" and bool(shard.logits)

    def _lacks_side(self, shard: Shard) -> bool:
        return self._writes_side(shard) and not self._side(shard).is_file()

    def _clear_sides(self, shards: Sequence[Shard]) -> None:
        """Removes full logits of an earlier run in this folder, and what a killed one left unfinished."""
        wanted = {self._side(shard) for shard in shards if self._writes_side(shard)}
        for file in self._sides.glob("logits-*") if self._sides.is_dir() else ():
            if file not in wanted:
                file.unlink()
        if self._sides.is_dir() and not wanted:
            shutil.rmtree(self._sides)

    def _publish(self, shard: Shard, fingerprint: str) -> bool:
        """Packs one shard; False if it was left out."""
        own = PackCounts()
        named = {"logits": [f"../logits/{self._side(shard).name}"]} if self._writes_side(shard) else {}
        metadata = head("rollouts", fingerprint=fingerprint, run=self._folder.run, **named)
        try:
            with self._folder.shard(shard.name, metadata) as sink:
                self._shard(shard, sink, own)
                sink.close(own.to_json())
        except BadInput as error:
            if not self._options.skip_bad:
                raise
            self._folder.skip(error, shard.name)
            self._watch.note(f"left out: {error}")
            return False
        self._result.add(own.to_json())
        self._result.tail_mass += own.tail_mass
        self._result.shards += 1
        return True

    def _shard(self, shard: Shard, sink: ParquetSink, own: PackCounts) -> None:
        logits = stored_logits(shard.logits)
        rules = row_rules(self._options, logits, self._selection)
        with self._side_file(shard) as side:
            restages = may_change_values(shard, self._options)
            packer = Packer(
                self._options.to, self._device, vocab_size=self._options.vocab_size, restages=restages, side=side
            )
            for batch, first in named_batches(shard, self._options.columns):
                self._batch(packer, batch, str(shard.path), first, rules, logits, sink, own)
        if side is not None and logits is not None:
            self._check_copy(side, logits, own)

    @contextmanager
    def _side_file(self, shard: Shard) -> Iterator[Side | None]:
        """Full logits in q16, whole and on the disk when the block ends."""
        if not self._writes_side(shard):
            yield None
            return
        self._sides.mkdir(exist_ok=True)
        with LogitsTableWriter(self._side(shard), "q16") as writer:
            yield Side(writer)
        sync_file(self._side(shard))
        sync_folder(self._sides)

    def _batch(
        self,
        packer: Packer,
        batch: pa.RecordBatch,
        place: str,
        first: int,
        rules: RowRules,
        logits: StoredLogits | None,
        sink: ParquetSink,
        own: PackCounts,
    ) -> None:
        """Packs rows; a fault that only their logits show is skipped row by row."""
        rollouts, errors = read_rows(batch, place, np.arange(first, first + batch.num_rows), rules)
        self._skip(errors, own)
        try:
            found = packer.pack(rollouts, batch.schema, logits)
        except RowError as error:
            if not self._options.skip_bad:
                raise
            if len(rollouts) == 1:
                self._skip([error], own)
                return
            for number in rollouts.row_numbers.tolist():
                one = batch.slice(number - first, 1)
                self._batch(packer, one, place, number, rules, logits, sink, own)
            return
        own.count(found)
        sink.write(found.columns)
        self._watch.advance(int(rollouts.response.offsets[-1]))

    def _skip(self, errors: Sequence[RowError], own: PackCounts) -> None:
        if errors and not self._options.skip_bad:
            raise errors[0]
        for error in errors:
            self._watch.note(f"left out: {error}")
            self._folder.skip(error)
        own.num_skipped += len(errors)

    def _check_copy(self, side: Side, logits: StoredLogits, own: PackCounts) -> None:
        """Reads the written logits back and measures how far they are from what was stored.

        Raises:
            OutputError: further than q16 may be.
        """
        copy = stored_logits([side.writer.path])
        assert copy is not None
        for name, (num_tokens, place) in side.rollouts.items():
            kl, most = copy_loss(logits, copy, name, num_tokens, self._options.vocab_size)
            if not (kl <= most).all():
                at = int(np.argmax(kl - most))
                raise OutputError(
                    f"the copy of position {at} is off by a KL of {kl[at]:.3g}, {most[at]:.3g} at most is right",
                    place=place,
                    next_step="This is a fault of trm-audit or of the machine: nothing of the shard was published.",
                )
            own.num_copied += len(kl)
            own.kl_sum += float(kl.sum())
            own.kl_max = max(own.kl_max, float(kl.max(initial=0.0)))


def row_rules(options: PackOptions, logits: StoredLogits | None, selection: Selection) -> RowRules:
    """What rows are held against where no model says how large the vocabulary is."""
    return RowRules(
        logits=logits,
        vocab_size=options.vocab_size,
        wider_logits=options.vocab_size is not None,
        defaults=options.defaults,
        mode_given=options.mode_given,
        duplicates=selection.duplicates,
    )


def named_batches(shard: Shard, renames: Mapping[str, str]) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Batches of a shard under our names, and the number of each one's first row."""
    first = 0
    for batch in read_batches(shard.path, batch_rows=rows_at_once(shard, BATCH_BYTES)):
        names = schema.renamed(batch.schema, renames, str(shard.path))
        yield pa.RecordBatch.from_arrays(batch.columns, names=names), first
        first += batch.num_rows


def may_change_values(shard: Shard, options: PackOptions) -> bool:
    """Whether a row may get other sampled log-probabilities: its logits are rounded and lists made of them, or the
    stored ones are of an earlier stage than what is packed, by its settings.
    """
    blocks = chain.from_iterable(index_files(shard.logits).values())
    if options.to.kind in ("sketch", "topk") and any(block.dtype != torch.float32 for block in blocks):
        return True
    theirs = {options.columns.get(name, name): name for name in SAMPLING}
    there = [name for name in pq.read_schema(shard.path).names if name in theirs]
    if not there:
        return changes_stage(options.defaults)
    known = {name: schema.ROLLOUT_COLUMNS[name] for name in SAMPLING}
    for batch in read_batches(shard.path, batch_rows=65536, columns=there):
        named = batch.rename_columns([theirs[name] for name in batch.schema.names])
        rows = schema.conform(named, known, str(shard.path)).to_pylist()
        stated = ({name: value for name, value in row.items() if value is not None} for row in rows)
        if any(changes_stage(Sampling(**{**asdict(options.defaults), **one})) for one in stated):
            return True
    return False
