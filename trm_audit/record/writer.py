"""Rollout shards from a process that samples: each appears whole, and a crash costs the last rows, not the run.

Rows gather in memory until there are enough of them, or for long enough; then they become one file,
`rollouts-<writer>-00000.parquet`, which is written under a name that readers pass over (it begins with a dot), flushed
to the disk and renamed. A process that is killed outright loses the rows since its last shard. Several processes may
write into one folder: each writer has a name of its own.

What is not known while sampling may be absent. To add rewards later, read a shard, set the column, write it again:

    table = pyarrow.parquet.read_table(shard)
    at = table.schema.get_field_index("reward")
    rewards = [rewards_by_id[name] for name in table["rollout_id"].to_pylist()]
    trm_audit.write_rollout_table(shard, table.set_column(at, "reward", pyarrow.array(rewards, pyarrow.float64())))
"""

from __future__ import annotations

import io
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.util import Finalize
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trm_audit.errors import BadInput, OutputError, UsageError
from trm_audit.numerics.ragged import Bools
from trm_audit.record.evidence import TokenEvidence
from trm_audit.record.rows import Row, checked
from trm_audit.rollout import Sampling
from trm_audit.shards.publish import sync_file, sync_folder
from trm_audit.shards.rollout_writer import write_rollout_table
from trm_audit.shards.schema import ROLLOUT_COLUMNS, VERSION_PER_TOKEN
from trm_audit.shards.sketches import sketch_columns

BYTES_PER_SHARD = 256 << 20
"""Evidence that is held at most before a shard is written, however few its rows: long responses are large."""
BYTES_WAITING = 1 << 30
"""Evidence that is held at most while nothing can be written; beyond it the oldest rollouts are dropped."""
BYTES_PER_ROW = 2000
"""What a row takes in memory besides its values, about."""
LEADING = ("rollout_id", "group_id", "prompt_ids", "response_ids", "response_mask")
UNSTORABLE = (pa.ArrowException, TypeError, ValueError, OverflowError)
"""What Arrow and Parquet raise at values that they cannot hold."""

log = logging.getLogger(__name__)


class RolloutWriter:
    """Context manager that writes rollouts, as they are finished, into shards of schemas/rollout.md.

        with RolloutWriter("rollouts/", engine="mine") as writer:
            writer.add(prompt_ids=[5, 11], response_ids=tokens, evidence=evidence(logits, tokens, sampling),
                       sampling=sampling, reward=1.0)

    What was added is published when the block ends, with or without an exception, and when the interpreter exits.

    Args:
        folder: made if it is not there.
        engine: what samples, for the column of that name.
        rows_per_shard: a shard is written when so many rows are there.
        seconds: or when a row is added so long after the first of them. After a shard could not be written, `add` waits
            so long before it tries again; what is held meanwhile is at most 1 GiB, then the oldest rollouts are dropped
            and the log says how many.

    Raises:
        UsageError: the numbers are not above 0, or the folder is the output of a command.
        OutputError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        engine: str | None = None,
        rows_per_shard: int = 512,
        seconds: float = 60.0,
    ) -> None:
        if rows_per_shard < 1 or not seconds > 0:
            raise UsageError(f"rows_per_shard = {rows_per_shard} and seconds = {seconds}: both are above 0")
        self.folder, self.engine = Path(folder), engine
        self._rows_per_shard, self._seconds = rows_per_shard, seconds
        self._kinds: dict[str, pa.DataType] = {}
        self._closed = False
        self._start()
        if (self.folder / "run.json").is_file():
            raise UsageError(
                "is the output of a trm-audit command, whose readers would not see what is recorded",
                place=str(self.folder),
                next_step="Give another folder.",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot be made ({error.strerror or error})", place=str(self.folder)) from error

    def _start(self) -> None:
        self._name, self._process, self._lock = uuid.uuid4().hex[:12], os.getpid(), Lock()
        self._rows: list[Row] = []
        self._seen: set[str] = set()
        self._shards, self._bytes, self._since, self._retry, self._dropped = 0, 0, 0.0, 0.0, 0
        self._at_exit = Finalize(None, self.close, exitpriority=0)  # atexit is not run in processes of multiprocessing

    def _own(self) -> None:
        """In a forked child this is another writer: the rows at hand are its parent's to write."""
        if self._process != os.getpid():
            self._start()

    def __enter__(self) -> RolloutWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Rows that are not published yet."""
        return len(self._rows)

    @property
    def blocked(self) -> bool:
        """Whether the latest attempt to write failed, less than `seconds` ago: `add` makes no other until then."""
        return time.monotonic() < self._retry

    def add(
        self,
        *,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        sampling: Sampling,
        evidence: TokenEvidence | None = None,
        logprobs: Sequence[float] | None = None,
        rollout_id: str | None = None,
        response_mask: Sequence[bool] | None = None,
        group_id: str | None = None,
        reward: float | None = None,
        policy_version: int | Sequence[int] | None = None,
        finish_reason: str | None = None,
        **columns: object,
    ) -> str:
        """Takes one finished rollout; returns its id.

        Args:
            prompt_ids: [P] token ids, without padding; lists, arrays and tensors will do, here and below.
            response_ids: [T] token ids, with the end-of-sequence token where it was sampled.
            sampling: temperature, top-p, top-k. Its `logprobs_mode` is that of `logprobs`; evidence is always of the
                policy that really sampled, and stored as `processed`.
            evidence: of the tokens that the policy sampled, in their order.
            logprobs: [T] log-probabilities (nats) of the response tokens, where there is no evidence.
            rollout_id: a new random one by default.
            response_mask: [T] True where the policy sampled the token, everywhere by default.
            group_id: rollouts of one prompt share it.
            reward: may be added to the shards later.
            policy_version: of the weights, one for the rollout or [T].
            finish_reason: why the response ended.
            columns: more columns of schemas/rollout.md, or your own. They pass through every stage.

        Raises:
            BadInput, UsageError: what a reader of the shard would refuse; the row is not taken.
            OutputError: a shard cannot be written; the rows, this one too, are kept for the next attempt.
        """
        self._own()
        given = {
            "rollout_id": uuid.uuid4().hex if rollout_id is None else rollout_id,
            "prompt_ids": prompt_ids,
            "response_ids": response_ids,
            "response_mask": response_mask,
            "group_id": group_id,
            "reward": reward,
            "policy_version": policy_version,
            "finish_reason": finish_reason,
            "engine": self.engine,
        }
        row = checked(given, columns, sampling, evidence, logprobs, str(self.folder))
        with self._lock:
            self._take(row)
            late = time.monotonic() - self._since >= self._seconds
            if self.blocked:
                self._drop_oldest()
            elif len(self._rows) >= self._rows_per_shard or self._bytes >= BYTES_PER_SHARD or late:
                self._publish()
        return row.name

    def _take(self, row: Row) -> None:
        if self._closed:
            raise UsageError("the RolloutWriter is closed", place=row.place)
        if row.name in self._seen:
            raise BadInput("was added before", place=row.place, next_step="Add each rollout once, or name it anew.")
        kinds = {name: self._kind(name, value, row) for name, value in row.extra.items()}
        try:
            stored = pa.table(_given([row], self._kinds | kinds))
            stored.validate()
        except UNSTORABLE as error:
            raise BadInput(
                f"cannot be stored: {error}",
                place=row.place,
                next_step="Give each column plain values of the type that schemas/rollout.md has for it.",
            ) from error
        row = replace(row, size=stored.nbytes + row.evidence_bytes + BYTES_PER_ROW)
        self._kinds |= kinds
        self._since = self._since if self._rows else time.monotonic()
        self._seen.add(row.name)
        self._rows.append(row)
        self._bytes += row.size

    def _kind(self, name: str, value: object, row: Row) -> pa.DataType:
        """Type that holds a column's values so far and this one, without loss, and that Parquet can store."""
        try:
            if name in ROLLOUT_COLUMNS:
                return pa.array([value], ROLLOUT_COLUMNS[name].type).type
            before = self._kinds.get(name)
            both = [pa.schema([(name, one)]) for one in (before, pa.array([value]).type) if one is not None]
            kind = pa.unify_schemas(both, promote_options="permissive").field(name).type
            if kind != before:
                values = pa.array([one.extra.get(name) for one in self._rows], kind)
                pq.write_table(pa.table({name: values[:0]}), io.BytesIO())
            return kind
        except UNSTORABLE as error:
            raise BadInput(
                f"column {name!r} cannot hold {value!r}: {error}",
                place=row.place,
                next_step="Give a column values of one type in all rollouts.",
            ) from error

    def flush(self) -> None:
        """Publishes the rows at hand as a shard, if there are any.

        Raises:
            OutputError: it cannot be written; the rows are kept.
        """
        self._own()
        with self._lock:
            self._publish()

    def close(self) -> None:
        """Publishes the rows at hand; nothing can be added any more. Closing again does nothing."""
        self.flush()
        self._closed = True
        self._at_exit.cancel()

    def _publish(self) -> None:
        if not self._rows:
            return
        file = self.folder / f"rollouts-{self._name}-{self._shards:05d}.parquet"
        temporary = file.with_name(f".{file.name}")
        try:
            write_rollout_table(temporary, _table(self._rows, self._kinds))
            sync_file(temporary)
            os.replace(temporary, file)
            sync_folder(self.folder)
        except OSError as error:
            self._retry = time.monotonic() + self._seconds
            raise OutputError(
                f"cannot be written ({error.strerror or error})",
                place=str(file),
                next_step=f"Make room: the {len(self._rows)} rollouts are kept in memory, flush() tries again.",
            ) from error
        finally:
            with suppress(OSError):  # the folder may be gone: that is said already
                temporary.unlink(missing_ok=True)
        self._rows, self._bytes, self._shards, self._retry = [], 0, self._shards + 1, 0.0

    def _drop_oldest(self) -> None:
        """Keeps what waits for a disk within bounds; a quarter goes at once, so that the log is short."""
        if self._bytes <= BYTES_WAITING:
            return
        gone = 0
        while self._bytes > BYTES_WAITING * 3 // 4 and gone < len(self._rows) - 1:
            self._bytes -= self._rows[gone].size
            gone += 1
        del self._rows[:gone]
        self._dropped += gone
        log.error(
            "%s cannot be written for too long: the %d oldest rollouts that waited were dropped, %d in all, %d wait.",
            self.folder, gone, self._dropped, len(self._rows),
        )  # fmt: skip


def _table(rows: Sequence[Row], kinds: Mapping[str, pa.DataType]) -> pa.Table:
    """A shard's columns. Those of schemas/rollout.md are there in every shard, so that all have one schema."""
    given = _given(rows, kinds)
    evidence = _evidence_columns(rows, [row.values["response_mask"] for row in rows])
    return pa.table({name: given[name] for name in LEADING} | evidence | given)


def _given(rows: Sequence[Row], kinds: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
    """All columns but those of the evidence, whose arrays are of this package's own making."""
    columns = {name: pa.array([row.values[name] for row in rows], ROLLOUT_COLUMNS[name].type) for name in LEADING}
    for name in ("temperature", "top_p", "top_k", "logprobs_mode"):
        columns[name] = pa.array([getattr(row.sampling, name) for row in rows], ROLLOUT_COLUMNS[name].type)
    columns["policy_version"] = _versions(rows)
    for name in ("reward", "engine", "finish_reason"):
        columns[name] = pa.array([row.values[name] for row in rows], ROLLOUT_COLUMNS[name].type)
    present = dict.fromkeys(name for row in rows for name in row.extra)
    return columns | {name: pa.array([row.extra.get(name) for row in rows], kinds[name]) for name in present}


def _evidence_columns(rows: Sequence[Row], masks: Sequence[Bools]) -> dict[str, pa.Array]:
    columns = sketch_columns([row.evidence for row in rows], masks)
    given = pa.array([row.logprobs for row in rows], ROLLOUT_COLUMNS["rollout_logprobs"].type)
    return columns | {"rollout_logprobs": pc.coalesce(columns["rollout_logprobs"], given)}


def _versions(rows: Sequence[Row]) -> pa.Array:
    """One number for each rollout, or for each token of all of them if one rollout has a list."""
    versions: list[Any] = [row.values["policy_version"] for row in rows]
    if not any(isinstance(version, np.ndarray) for version in versions):
        return pa.array(versions, ROLLOUT_COLUMNS["policy_version"].type)
    spread = [
        np.full(len(row.values["response_ids"]), version) if isinstance(version, int) else version
        for row, version in zip(rows, versions, strict=True)
    ]
    return pa.array(spread, VERSION_PER_TOKEN.type)
