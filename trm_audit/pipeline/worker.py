"""Scoring shards one after another: in this process, or as one of several that stand side by side (see `devices`).

A worker process hears what to do through one pipe and tells what it did through the same. It holds nothing that could
be lost: what it has published is on disk, so it may be killed at any moment, and it ends itself when its parent is
gone.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

from trm_audit.errors import EXIT_INTERNAL, AuditError, BadInput
from trm_audit.pipeline.noise import measure_noise
from trm_audit.pipeline.progress import Progress
from trm_audit.pipeline.rollouts import RolloutLoop
from trm_audit.pipeline.selection import Selection
from trm_audit.pipeline.trainer import ScoreOptions, Trainer
from trm_audit.pipeline.worth import measure_worth
from trm_audit.shards.publish import OutputFolder
from trm_audit.shards.read import Shard


@dataclass(frozen=True)
class Job:
    """What a run is about, the same for all that score it.

    Attributes:
        options: settings.
        shards: all of the run in order, those of other parts and those done before included.
        selection: their rows.
    """

    options: ScoreOptions
    shards: Sequence[Shard]
    selection: Selection


@dataclass(frozen=True)
class Task:
    """A shard that has to be scored, and the footer keys that its scores get."""

    shard: Shard
    metadata: Mapping[bytes, bytes]


@dataclass(frozen=True)
class Scored:
    """What became of a shard: published with these counts, or left out by `--skip-bad` for this error."""

    name: str
    counts: Mapping[str, object]
    error: BadInput | None = None


def load(job: Job) -> Trainer:
    """The trainer of a run with everything measured that its scores carry beside themselves."""
    trainer = Trainer(job.options)
    measure_noise(trainer, job.shards, job.selection)
    measure_worth(trainer, job.shards, job.selection)
    return trainer


def score_shard(task: Task, job: Job, trainer: Trainer, folder: OutputFolder, watch: Progress) -> Scored:
    """Scores a shard and publishes it whole.

    Raises:
        AuditError: nothing of the shard is published then.
    """
    name = task.shard.name
    try:
        with folder.shard(name, task.metadata) as sink:
            rebuilds = any(shard.logits for shard in job.shards)
            loop = RolloutLoop(trainer, job.selection, sink, watch, folder, rebuilds)
            loop.shard(task.shard)
            sink.close(loop.counts.to_json())
    except BadInput as error:
        if not job.options.skip_bad:
            raise
        return Scored(name, {}, error)
    return Scored(name, loop.counts.to_json())


class Remote:
    """Progress that is shown in another process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def start(self, total: int) -> None:
        self._connection.send(("start", total))

    def advance(self, tokens: int) -> None:
        self._connection.send(("advance", tokens))

    def note(self, text: str) -> None:
        self._connection.send(("note", text))


def work(connection: Connection, output: Path, workers: int) -> None:
    """The life of a worker process.

    It is sent a `Job` and then `Task`s. It sends pairs: ("ready", (run, remarks)) when the model is loaded,
    ("scored", Scored) after each task, the calls of `Progress` between, ("error", exception) once and last.

    Args:
        connection: to the parent.
        output: folder of the run; the parent holds its locks.
        workers: processes that share this machine's cores.
    """
    heard: SimpleQueue[Job | Task] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, heard), daemon=True).start()
    try:
        job = heard.get()
        assert isinstance(job, Job)
        settle(job.options, workers)
        _serve(job, heard, connection, output)
    except AuditError as error:
        connection.send(("error", error))
    except Exception as error:
        fault = RuntimeError(f"{type(error).__name__}: {error}")
        fault.add_note(traceback.format_exc())
        connection.send(("error", fault))


def _listen(connection: Connection, heard: SimpleQueue[Job | Task]) -> None:
    """Takes in what the parent sends, and ends this process at once when the parent is no more."""
    try:
        while True:
            heard.put(connection.recv())
    except (EOFError, OSError):
        os._exit(EXIT_INTERNAL)


def settle(options: ScoreOptions, workers: int) -> None:
    """Takes this process's share of the cores, and its GPU as the current one."""
    if options.model is None:
        return
    import torch

    from trm_audit.engine.loading import pick_device

    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    device = pick_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _serve(job: Job, heard: SimpleQueue[Job | Task], connection: Connection, output: Path) -> None:
    trainer, watch = load(job), Remote(connection)
    connection.send(("ready", (trainer.run(), trainer.remarks)))
    folder: OutputFolder | None = None
    while isinstance(task := heard.get(), Task):  # by the first, the parent has opened the folder
        folder = folder or OutputFolder(output, {}, joins=True)
        connection.send(("scored", score_shard(task, job, trainer, folder, watch)))
