"""Who scores the shards of a run: this process, or one process for each of several devices.

Each worker has a pipe of its own: one that is killed can spoil no queue of the others, and a pipe that ends says that
its worker has died. Only this process opens the output folder; it keeps the locks while workers publish into it.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Protocol

from trm_audit.errors import AuditError, UsageError
from trm_audit.pipeline.progress import Progress
from trm_audit.pipeline.worker import Job, Scored, Task, load, score_shard, work
from trm_audit.shards.publish import OutputFolder, difference

PATIENCE = 10.0
MEMORY = (
    "Often the machine was out of memory: lower --max-tokens or name fewer devices, and run the same command again. "
    "Finished shards are kept."
)
UNGUARDED = (
    "What it printed says more. A script of your own that scores on several devices does so below "
    "`if __name__ == '__main__':`, for each process reads it again."
)


class Scorers(Protocol):
    """Scores shards.

    Attributes:
        run, remarks: what makes the scores, and what to tell the user of it: see `Trainer`.
    """

    run: Mapping[str, object]
    remarks: Sequence[str]

    def score(self, tasks: Sequence[Task], folder: OutputFolder) -> Generator[Scored, None, None]:
        """Scores and publishes shards; yields what became of each, in the order in which they are finished."""


@contextmanager
def scorers(job: Job, output: Path, watch: Progress) -> Iterator[Scorers]:
    """Who scores the shards of a run, ready to begin.

    No more processes than shards are started, and none beside this one for a single device.

    Raises:
        AuditError: as `Trainer` would, or a worker died.
    """
    part, parts = job.options.part
    devices = job.options.devices
    busy = devices[: max(1, len(job.shards[part - 1 :: parts]))]
    if len(busy) < len(devices):
        watch.note(f"a shard is scored on one device: {len(devices) - len(busy)} of {len(devices)} have nothing to do")
    if len(busy) < 2:
        yield Alone(replace(job, options=job.options.on_one_device()), watch)
        return
    with SideBySide(job, busy, output, watch) as several:
        yield several


class Alone:
    """This process, on one device."""

    def __init__(self, job: Job, watch: Progress) -> None:
        self._job, self._watch, self._trainer = job, watch, load(job)
        self.run: Mapping[str, object] = self._trainer.run()
        self.remarks: Sequence[str] = self._trainer.remarks

    def score(self, tasks: Sequence[Task], folder: OutputFolder) -> Generator[Scored, None, None]:
        for task in tasks:
            yield score_shard(task, self._job, self._trainer, folder, self._watch)


class Worker:
    """A worker process as its parent sees it.

    Attributes:
        connection: to be waited for.
        task: what it is doing, None where it is idle or not yet ready.
        run, remarks: how it scores, empty until it is ready.
    """

    def __init__(self, device: str, job: Job, output: Path, workers: int) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.task: Task | None = None
        self.run: Mapping[str, object] = {}
        self.remarks: Sequence[str] = ()
        self._device = device
        self._process = context.Process(target=work, args=(theirs, output, workers), daemon=True)
        with _sigint_held_back():
            self._start()
        theirs.close()
        self._send(job)

    def _start(self) -> None:
        try:
            self._process.start()
        except OSError as error:
            raise AuditError(
                f"no process can be started ({error.strerror or error})",
                place=f"--devices {self._device}",
                next_step="Name fewer devices.",
            ) from error

    def hand(self, task: Task) -> None:
        self.task = task
        self._send(task)

    def _send(self, what: Job | Task) -> None:
        try:
            self.connection.send(what)
        except OSError:
            raise self._died() from None

    def receive(self) -> tuple[str, object]:
        """What it says next. Raises what ended it, or that it died."""
        try:
            name, value = self.connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if name == "error":
            raise value
        return str(name), value

    def _died(self) -> AuditError:
        self._process.join(PATIENCE)
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return AuditError(
            f"the process that scores here {how}, " + (f"with {self.task.shard.path}" if self.task else "as it began"),
            place=f"--devices {self._device}",
            next_step=MEMORY if code < 0 else UNGUARDED,
        )

    def stop(self) -> None:
        """Ends it at once: all that counts is on disk."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self.connection.close()


class SideBySide(AbstractContextManager["SideBySide"]):
    """One process for each device. The first that fails ends all, and its error is raised here.

    Args:
        job: the work.
        devices: two or more, of one type.
        output: folder of the run.
        watch: sees the progress of all as one.
    """

    def __init__(self, job: Job, devices: Sequence[str], output: Path, watch: Progress) -> None:
        self._watch = watch
        self._workers: list[Worker] = []
        self._idle: list[Worker] = []
        try:
            for device in devices:
                options = job.options.on_one_device(device)
                if self._workers:  # the first measures for all
                    options = replace(options, noise_floor=0.0)
                self._workers.append(Worker(device, replace(job, options=options), output, len(devices)))
            while not self._workers[0].run:
                self._ready(*self._next())
            self.run, self.remarks = self._workers[0].run, self._workers[0].remarks
        except BaseException:
            self.stop()
            raise

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def score(self, tasks: Sequence[Task], folder: OutputFolder) -> Generator[Scored, None, None]:
        """Scores shards, the largest first, so that the devices finish together."""
        queue = deque(sorted(tasks, key=lambda task: -task.shard.num_tokens))
        try:
            self._hand_out(queue)
            for _ in tasks:
                while (said := self._next())[1] != "scored":
                    self._ready(*said)
                    self._hand_out(queue)
                worker, _, scored = said
                worker.task = None
                self._idle.append(worker)
                self._hand_out(queue)
                assert isinstance(scored, Scored)
                yield scored
        finally:
            under_way = [worker.task.shard.name for worker in self._workers if worker.task is not None]
            self.stop()
            for name in under_way:
                folder.clear_away(name)

    def _hand_out(self, queue: deque[Task]) -> None:
        while queue and self._idle:
            self._idle.pop(0).hand(queue.popleft())

    def _next(self) -> tuple[Worker, str, object]:
        """What a worker says next that is not progress."""
        by_connection: dict[object, Worker] = {worker.connection: worker for worker in self._workers}
        while True:
            for connection in wait([worker.connection for worker in self._workers]):
                worker = by_connection[connection]
                name, value = worker.receive()
                if name == "advance":
                    assert isinstance(value, int)
                    self._watch.advance(value)
                elif name == "note":
                    self._watch.note(str(value))
                else:
                    return worker, name, value

    def _ready(self, worker: Worker, name: str, said: object) -> None:
        """Notes that a worker has loaded its model, in the same way as those before it."""
        assert name == "ready"
        assert isinstance(said, tuple)
        run, remarks = said
        for other in self._workers:
            if other.run and other.run["fingerprint"] != run["fingerprint"]:
                raise UsageError(
                    f"the devices would score with {difference(other.run, run)}",
                    place="--devices",
                    next_step="Scores of one run are made in one way: name devices of one kind, or force --sharing.",
                )
        worker.run, worker.remarks = run, remarks
        self._idle.append(worker)

    def stop(self) -> None:
        """Ends all workers at once."""
        while self._workers:
            self._workers.pop().stop()


@contextmanager
def _sigint_held_back() -> Iterator[None]:
    """A block whose child processes never hear Ctrl-C: a terminal sends it to all, this process answers for them."""
    resource_tracker.ensure_running()  # starting it would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
