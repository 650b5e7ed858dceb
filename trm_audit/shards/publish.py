"""An output folder that is never half written: temporary file, fsync, check, rename; a manifest; `_SUCCESS` last.

out/data/*.parquet   the shards, and nothing else (readers of whole folders fail on any other file)
out/run.json         what made it: the fingerprint that each shard's footer repeats
out/manifest.jsonl   a line per published shard
out/skipped.jsonl    what --skip-bad left out, and why
out/_SUCCESS         JSON, written when every shard of the run is there
out/.tmp/            shards in flight, and the locks of their writers
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import filelock

from trm_audit.errors import AuditError, BadInput, OutputError, UsageError
from trm_audit.shards import schema
from trm_audit.shards.read import open_parquet
from trm_audit.shards.write import ParquetSink

LOCK_SECONDS = 60.0
STREAM_SHARD = "stream.parquet"
NOT_TOLD_APART = frozenset({"fingerprint", "model", "device_map", "noise_floor", "evidence_worth"})
"""What a run says of itself beside its fingerprint: names of what a hash identifies, figures measured on the way."""


class OutputFolder:
    """One run's output.

    Args:
        path: the folder; made if it is not there.
        run: what made it, as JSON values; its `fingerprint` tells runs apart.
        overwrite: throw another run's shards away instead of refusing.
        part: (i, n): this process writes the i-th of n parts of the shards; parts may run at the same time.
        joins: another process of the same run has opened the folder and keeps it locked; this one publishes shards into
            it, and `run` does not matter.

    Raises:
        BadInput: the folder holds another run's output or something that is not ours.
        UsageError: another process is writing the same part, or another division of the run.
    """

    def __init__(
        self,
        path: Path,
        run: Mapping[str, object],
        *,
        overwrite: bool = False,
        part: tuple[int, int] = (1, 1),
        joins: bool = False,
    ) -> None:
        self.path, self.run, self._locks = path, dict(run), ExitStack()
        self.data, self._tmp = path / "data", path / ".tmp"
        self._part, self._overwrite = part, overwrite
        try:
            if not joins:
                self._open()
            self._manifest = {str(line["name"]): line for line in read_lines(self.path / "manifest.jsonl")}
            self._skipped = {json.dumps(line, sort_keys=True) for line in read_lines(self.path / "skipped.jsonl")}
        except BaseException:
            self._locks.close()
            raise

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._locks.close()

    def _open(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise BadInput("is a file, a folder is needed", place=str(self.path), next_step="Give another -o.")
        strangers = self.path.is_dir() and any(self.path.iterdir()) and not (self.path / "run.json").is_file()
        if strangers and not self._tmp.is_dir():
            raise BadInput(
                "is not empty and was not written by trm-audit", place=str(self.path), next_step="Give another -o."
            )
        with _writing(self.path):
            self._tmp.mkdir(parents=True, exist_ok=True)
            self.data.mkdir(exist_ok=True)
        with self._folder_lock():
            self._lock_part()
            self._check_run()

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        try:
            with filelock.FileLock(self._tmp / "folder.lock", timeout=LOCK_SECONDS):
                yield
        except filelock.Timeout:
            raise UsageError("is locked by another process", place=str(self.path)) from None

    def _lock_part(self) -> None:
        i, n = self._part
        mine = self._tmp / f"part-{i}-of-{n}.lock"
        for other in self._tmp.glob("part-*.lock"):
            if other != mine and not other.name.endswith(f"-of-{n}.lock"):
                self._hold(other, keep=False)
        self._hold(mine, keep=True)

    def _hold(self, file: Path, keep: bool) -> None:
        lock = filelock.FileLock(file, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UsageError(
                f"another process is writing here ({file.name})",
                place=str(self.path),
                next_step="Wait for it, or share the work out with --part i/n.",
            ) from None
        if keep:
            self._locks.callback(lock.release)
        else:
            lock.release()

    def _check_run(self) -> None:
        file = self.path / "run.json"
        if file.is_file():
            found = json.loads(file.read_text("utf-8"))
            if found.get("fingerprint") == self.run["fingerprint"]:
                return
            if found.get("kind") != self.run["kind"]:
                raise BadInput(
                    f"holds {found.get('kind')}, which {self.run['kind']} never replace",
                    place=str(self.path),
                    next_step="Give another -o.",
                )
            if not self._overwrite and any(self.data.iterdir()):
                raise BadInput(
                    f"was made with {difference(found, self.run)} (fingerprint {str(found.get('fingerprint'))[:8]}, "
                    f"this run {str(self.run['fingerprint'])[:8]})",
                    place=str(self.path),
                    next_step="Use --overwrite to make it again, or another -o.",
                )
            self._clear()
        publish_text(file, json.dumps(self.run, indent=1, sort_keys=True) + "\n")

    def _clear(self) -> None:
        (self.path / "_SUCCESS").unlink(missing_ok=True)
        for name in ("manifest.jsonl", "skipped.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.data)
        self.data.mkdir()

    def is_done(self, name: str, fingerprint: str) -> bool:
        """Whether a shard is published with this fingerprint. Raises BadInput for one of other input."""
        file = self.data / name
        if not file.exists():
            return False
        metadata = open_parquet(file).metadata
        found = (metadata.metadata or {}).get(schema.FINGERPRINT, b"").decode()
        if found != fingerprint and self._overwrite:
            return False
        if found != fingerprint:
            raise BadInput(
                f"was made from other input (fingerprint {found[:8]}, now {fingerprint[:8]})",
                place=str(file),
                next_step="Use --overwrite to make it again, or another -o.",
            )
        if name not in self._manifest:  # killed between the rename and the line
            self._note(name)
        return True

    def manifest(self) -> dict[str, dict[str, object]]:
        """Published shards by name, as their manifest lines say."""
        return dict(self._manifest)

    @contextmanager
    def shard(self, name: str, metadata: Mapping[bytes, bytes]) -> Iterator[ParquetSink]:
        """A sink in `.tmp`. Leaving the block publishes it under `name` if it was closed; an error leaves nothing.

        Raises:
            OutputError: the disk is full, or refuses for another reason.
        """
        temporary = self._tmp / name
        with _writing(self.data / name):
            sink = ParquetSink(temporary, metadata)
            try:
                yield sink
                self._publish(temporary, sink.rows, name)
            finally:
                with suppress(OSError):  # closing writes what is buffered, which a full disk refuses again
                    sink.abandon()
                temporary.unlink(missing_ok=True)

    def clear_away(self, name: str) -> None:
        """Removes what a process that was killed left of a shard in flight."""
        (self._tmp / name).unlink(missing_ok=True)

    def stream_shard(self, metadata: Mapping[bytes, bytes]) -> AbstractContextManager[ParquetSink]:
        """A sink for what came as a stream: one shard, `STREAM_SHARD`. It cannot be resumed, so an old one is refused.

        Raises:
            BadInput: it is there already.
        """
        if (self.data / STREAM_SHARD).exists() and not self._overwrite:
            raise BadInput(
                "is there already, and a stream cannot be resumed",
                place=str(self.data / STREAM_SHARD),
                next_step="Use --overwrite, or another -o.",
            )
        return self.shard(STREAM_SHARD, metadata)

    def _publish(self, temporary: Path, rows: int, name: str) -> None:
        sync_file(temporary)
        found = open_parquet(temporary).metadata
        if found.num_rows != rows or schema.COUNTS not in (found.metadata or {}):
            raise OutputError("did not come back as it was written", place=str(temporary))
        (self.path / "_SUCCESS").unlink(missing_ok=True)
        os.replace(temporary, self.data / name)
        sync_folder(self.data)
        self._note(name)

    def _note(self, name: str) -> None:
        metadata = open_parquet(self.data / name).metadata
        line = {
            "name": name,
            "rows": metadata.num_rows,
            "bytes": (self.data / name).stat().st_size,
            "fingerprint": metadata.metadata[schema.FINGERPRINT].decode(),
            "counts": json.loads(metadata.metadata[schema.COUNTS]),
        }
        append_line(self.path / "manifest.jsonl", line)
        self._manifest[name] = line

    def skip(self, error: AuditError, shard: str = "") -> None:
        """Notes, once, something that --skip-bad left out: a row, a file, or a whole `shard` of the run."""
        line = {"place": error.place, "cause": error.cause, "next_step": error.next_step, "shard": shard}
        text = json.dumps(line, sort_keys=True)
        if text not in self._skipped:
            append_line(self.path / "skipped.jsonl", line)
            self._skipped.add(text)

    def carry(self, file: Path) -> None:
        """Copies a small file, if it is there, beside the shards: what the next stage has no other way to find."""
        if file.is_file():
            publish_bytes(self.path / file.name, file.read_bytes())

    def begin(self, names: Sequence[str]) -> None:
        """Takes an older `_SUCCESS` away if shards of the run are missing: the folder must not be read as whole."""
        with self._folder_lock():
            if any(not (self.data / name).exists() for name in names):
                (self.path / "_SUCCESS").unlink(missing_ok=True)

    def finish(self, names: Sequence[str], summary: Mapping[str, object]) -> bool:
        """Writes `_SUCCESS` if every shard of the run is there or was left out (the last of several parts does)."""
        with self._folder_lock():
            left_out = {line.get("shard") for line in read_lines(self.path / "skipped.jsonl")}
            there = [name for name in names if (self.data / name).exists()]
            if not {*names} <= {*there, *left_out}:
                (self.path / "_SUCCESS").unlink(missing_ok=True)
                return False
            success = {**summary, "shards": there}
            publish_text(self.path / "_SUCCESS", json.dumps(success, indent=1, sort_keys=True) + "\n")
            return True


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """A block whose OSErrors become an OutputError about `place`."""
    try:
        yield
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        room = "Make room or choose another -o, and run the same command again: finished shards are kept."
        raise OutputError(
            f"cannot be written ({error.strerror or error})",
            place=str(place),
            next_step="Make the folder first, or choose another -o." if missing else room,
        ) from error


def publish_text(file: Path, text: str) -> None:
    """Writes a small file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    publish_bytes(file, text.encode("utf-8"))


def publish_bytes(file: Path, content: bytes) -> None:
    """As `publish_text`, of bytes."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with _writing(file):
        try:
            temporary.write_bytes(content)
            sync_file(temporary)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(file.parent)


def read_lines(file: Path) -> list[dict[str, object]]:
    """The JSON lines of a file that is perhaps not there; a line that a dying writer left unfinished is not one."""
    out = []
    for text in file.read_text("utf-8").splitlines() if file.is_file() else ():
        with suppress(ValueError):
            out.append(json.loads(text))
    return out


def append_line(file: Path, line: Mapping[str, object]) -> None:
    """Appends one JSON line in one write, so that lines of several writers do not mix, nor with one left unfinished."""
    with _writing(file), open(file, "a+b") as out:
        size = out.seek(0, os.SEEK_END)
        out.seek(max(0, size - 1))
        torn = out.read(1) not in (b"", b"\n")
        out.write(b"\n" * torn + json.dumps(dict(line), sort_keys=True).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


def sync_file(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def told_apart(run: Mapping[str, object]) -> dict[str, object]:
    """The settings that tell a run from another. Of the way prefixes are shared, only which way it is."""
    out = {name: value for name, value in run.items() if name not in NOT_TOLD_APART}
    if isinstance(sharing := out.get("sharing"), Mapping):
        out["sharing"] = sharing["rung"]
    return out


def difference(found: Mapping[str, object], run: Mapping[str, object]) -> str:
    """What two runs differ in, for a message: the first key whose values differ."""
    old, new = told_apart(found), told_apart(run)
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            return f"another {key}"
    return "other settings"
