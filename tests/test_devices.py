"""Several processes side by side write what one writes, and whatever ends one of them ends all, with nothing lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run
from some_rollouts import Row, rollout, write_shard, write_shards

from trm_audit.errors import AuditError, RowError
from trm_audit.pipeline.devices import SideBySide
from trm_audit.pipeline.dry_run import dry_run
from trm_audit.pipeline.progress import Silent
from trm_audit.pipeline.score import ScoreOptions, ScoreResult, score
from trm_audit.pipeline.selection import Selection
from trm_audit.pipeline.worker import Job, Task
from trm_audit.shards.publish import OutputFolder
from trm_audit.shards.read import find_shards
from trm_audit.shards.write import head

TWO = ("cpu", "cpu")
STORED = ScoreOptions(trainer_logprobs="stored")


class Listens(Silent):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.total, self.done, self.notes = 0, 0, list[str]()

    def start(self, total: int) -> None:
        self.total = total

    def advance(self, tokens: int) -> None:
        self.done += tokens

    def note(self, text: str) -> None:
        self.notes.append(text)


def with_trainer(row: Row) -> Row:
    return {**row, "trainer_logprobs": [value - 0.02 for value in row["rollout_logprobs"]]}


def contents(folder: Path) -> dict[str, pa.Table]:
    return {file.name: pq.read_table(file).replace_schema_metadata() for file in sorted((folder / "data").iterdir())}


def footers(folder: Path) -> dict[str, dict[bytes, bytes]]:
    ours = {file.name: pq.read_metadata(file).metadata for file in sorted((folder / "data").iterdir())}
    return {
        name: {key: value for key, value in found.items() if key.startswith(b"trm_audit")}
        for name, found in ours.items()
    }


def counted(result: ScoreResult) -> dict[str, object]:
    return {name: value for name, value in asdict(result).items() if name != "seconds"}


def run_score(rollouts: Path, output: Path, options: ScoreOptions, watch: Silent | None = None) -> ScoreResult:
    return score([str(rollouts)], str(output), options, progress=watch)


def nothing_lies_about(output: Path) -> bool:
    return not list((output / ".tmp").glob("*.parquet")) and not multiprocessing.active_children()


# ---- what two devices do


def test_two_devices_write_to_the_byte_what_one_does_and_one_goes_on_where_they_were(
    checkpoint: Path, tmp_path: Path
) -> None:
    # GIVEN five shards of different size, some with full logits, scored on one device
    write_shards(tmp_path / "rollouts", 3, 6, "exact")
    write_shard(tmp_path / "rollouts" / "part-3.parquet", [rollout(i, length=40) for i in range(30, 60)])
    write_shard(tmp_path / "rollouts" / "part-4.parquet", [rollout(70)])
    options = ScoreOptions(model=checkpoint)
    alone, both = Listens(), Listens()
    one = run_score(tmp_path / "rollouts", tmp_path / "one", options, alone)
    # WHEN two devices score them
    two = run_score(tmp_path / "rollouts", tmp_path / "two", replace(options, devices=TWO), both)
    # THEN columns, footers, settings, counts and what a user sees are the same
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert footers(tmp_path / "two") == footers(tmp_path / "one")
    for name in ("run.json", "_SUCCESS"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    manifests = [(tmp_path / name / "manifest.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert sorted(manifests[0]) == sorted(manifests[1])
    assert counted(two) == counted(one)
    assert (two.shards, two.complete) == (5, True)
    assert (both.total, both.done, both.notes) == (alone.total, alone.done, alone.notes)
    assert nothing_lies_about(tmp_path / "two")
    # WHEN shards of the two are missing THEN the one does those only
    for k in (3, 4):
        (tmp_path / "two" / "data" / f"part-{k}.parquet").unlink()
    again = run_score(tmp_path / "rollouts", tmp_path / "two", options)
    assert (again.done, again.shards, again.complete) == (3, 2, True)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_what_skip_bad_leaves_out_is_counted_over_all_devices_and_without_it_the_first_error_ends_all(
    rollouts: Path, tmp_path: Path
) -> None:
    # GIVEN bad rows in two shards and a shard whose row group is damaged
    for k in (3, 4):
        bad = with_trainer(rollout(20 + k, temperature=-1.0))
        write_shard(rollouts / f"part-{k}.parquet", [with_trainer(rollout(10 * k)), bad])
    broken = write_shard(rollouts / "part-5.parquet", [with_trainer(rollout(i, length=50)) for i in range(60, 64)])
    content = bytearray(broken.read_bytes())
    content[200] ^= 1
    broken.write_bytes(content)
    # WHEN one and two devices go on without them
    options = replace(STORED, skip_bad=True)
    results = [
        run_score(rollouts, tmp_path / name, replace(options, devices=devices))
        for name, devices in (("one", ()), ("two", TWO))
    ]
    # THEN they count and note the same
    assert counted(results[0]) == counted(results[1])
    assert (results[1].num_skipped, results[1].bad_shards, results[1].complete) == (2, 1, True)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    notes = [(tmp_path / name / "skipped.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert sorted(notes[0]) == sorted(notes[1])
    # WHEN bad rows are not to be left out THEN place, cause, next step and exit code are those of a single process
    (rollouts / "part-5.parquet").unlink()
    (rollouts / "part-4.parquet").unlink()
    with pytest.raises(RowError) as expected:
        run_score(rollouts, tmp_path / "three", STORED)
    with pytest.raises(RowError) as caught:
        run_score(rollouts, tmp_path / "four", replace(STORED, devices=TWO))
    assert str(caught.value) == str(expected.value)
    for name in ("place", "cause", "next_step", "exit_code"):
        assert getattr(caught.value, name) == getattr(expected.value, name)
    assert nothing_lies_about(tmp_path / "four")
    assert not (tmp_path / "four" / "_SUCCESS").exists()


def test_a_part_of_a_run_may_have_several_devices_that_go_on_where_it_was(tmp_path: Path) -> None:
    # GIVEN a run in two parts, of the first of which one shard is there
    for k in range(5):
        write_shard(tmp_path / "rollouts" / f"part-{k}.parquet", [with_trainer(rollout(k))])
    run_score(tmp_path / "rollouts", tmp_path / "out", replace(STORED, part=(2, 2)))
    (tmp_path / "out" / "data" / "part-1.parquet").unlink()
    # WHEN more devices than it has shards do the rest THEN they do what is missing, and the other part is not touched
    watch, options = Listens(), replace(STORED, devices=(*TWO, "cpu"), part=(2, 2))
    second = run_score(tmp_path / "rollouts", tmp_path / "out", options, watch)
    assert (second.done, second.shards, second.complete) == (1, 1, False)
    assert watch.notes == ["a shard is scored on one device: 1 of 3 have nothing to do"]
    first = run_score(tmp_path / "rollouts", tmp_path / "out", replace(STORED, part=(1, 2)))
    assert (first.done, first.shards, first.complete) == (0, 3, True)


def test_a_dry_run_divides_by_the_devices_that_have_work(run: Run, rollouts: Path) -> None:
    for devices, busy in (((), 1), (TWO, 2), (("cpu",) * 9, 3)):
        found = dry_run([str(rollouts)], replace(STORED, devices=devices))
        assert found.devices == busy
        assert found.seconds == pytest.approx(found.num_tokens / found.tokens_per_second)
    outcome = run("score", rollouts, "--trainer-logprobs", "stored", "--devices", "cpu,cpu", "--dry-run")
    assert b"tokens/s of 2 devices (one was measured)" in outcome.out
    assert b"devices" not in run("score", rollouts, "--trainer-logprobs", "stored", "--dry-run").out


# ---- what ends them


class Kills(Silent):
    """Does with the worker processes what the kernel does when memory runs out."""

    def advance(self, tokens: int) -> None:
        for process in multiprocessing.active_children():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)


class Interrupts(Silent):
    def advance(self, tokens: int) -> None:
        raise KeyboardInterrupt


def test_a_worker_that_is_killed_is_reported_and_what_was_published_stays(rollouts: Path, tmp_path: Path) -> None:
    # GIVEN workers that the kernel kills at work
    with pytest.raises(
        AuditError, match=r"--devices cpu: the process that scores here was killed by SIGKILL"
    ) as caught:
        run_score(rollouts, tmp_path / "out", replace(STORED, devices=TWO), Kills())
    assert "out of memory: lower --max-tokens or name fewer devices" in caught.value.next_step
    assert nothing_lies_about(tmp_path / "out")
    there = len(contents(tmp_path / "out"))
    # WHEN the same command runs again THEN it goes on, and the output is that of a run that nothing disturbed
    again = run_score(rollouts, tmp_path / "out", STORED)
    assert (again.done, again.shards, again.complete) == (there, 3 - there, True)
    run_score(rollouts, tmp_path / "undisturbed", STORED)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_parent_that_is_interrupted_takes_its_workers_with_it_before_it_unlocks_the_folder(
    rollouts: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_score(rollouts, tmp_path / "out", replace(STORED, devices=TWO), Interrupts())
    assert nothing_lies_about(tmp_path / "out")
    assert run_score(rollouts, tmp_path / "out", STORED).complete


def test_a_fault_of_ours_in_a_worker_is_raised_with_its_traceback(rollouts: Path, tmp_path: Path) -> None:
    # GIVEN a job that contradicts itself: a shard is to be scored of which no rows were selected
    shards = find_shards([str(rollouts)], "rollouts").shards
    job = Job(STORED, shards, Selection())
    tasks = [Task(shard, head("scores", fingerprint="f")) for shard in shards]
    # THEN the parent says what happened and where
    with (
        SideBySide(job, TWO, tmp_path / "out", Silent()) as team,
        OutputFolder(tmp_path / "out", team.run) as folder,
        pytest.raises(RuntimeError, match=r"^KeyError: 'part-\d\.parquet'") as caught,
    ):
        list(team.score(tasks, folder))
    assert "rollouts.py" in "".join(caught.value.__notes__)
    assert nothing_lies_about(tmp_path / "out")


def test_a_script_that_every_process_would_run_again_is_told_so(rollouts: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import trm_audit\n"
        "options = trm_audit.ScoreOptions(trainer_logprobs='stored', devices=('cpu', 'cpu'))\n"
        f"trm_audit.score([{str(rollouts)!r}], {str(tmp_path / 'out')!r}, options)\n"
    )
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=90)
    assert found.returncode == 1
    assert "--devices cpu: the process that scores here ended with exit code 1, as it began" in found.stderr
    assert "below `if __name__ == '__main__':`" in found.stderr


def processes(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def until(holds: Callable[[], bool]) -> None:
    patience = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < patience
        time.sleep(0.01)


@pytest.mark.parametrize("moment", ["as the workers start", "as they work"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_no_worker_outlives_the_command_and_the_same_command_goes_on(
    tmp_path: Path, how: signal.Signals, moment: str
) -> None:
    # GIVEN a command with two workers
    for k in range(60):
        write_shard(tmp_path / "rollouts" / f"part-{k:03d}.parquet", [with_trainer(rollout(k))])
    command = [Path(sys.executable).with_name("trm-audit"), "score", tmp_path / "rollouts"]
    command += ["--trainer-logprobs", "stored", "--devices", "cpu,cpu", "-o", tmp_path / "out"]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, start_new_session=True)
    data = tmp_path / "out" / "data"
    if moment == "as they work":
        until(lambda: data.is_dir() and any(data.iterdir()))
    else:
        until(lambda: len(processes(process.pid)) >= 4)  # its tracker of shared memory is the fourth
    # WHEN Ctrl-C is pressed, which a terminal sends to all of them, or the command alone is killed
    if how is signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.kill()
    _, said = process.communicate(timeout=90)
    # THEN nobody is left, and nothing is lost
    assert process.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL)
    until(lambda: not processes(process.pid))
    published = len(list(data.iterdir())) if data.is_dir() else 0
    assert published < 60
    if how is signal.SIGINT:
        assert "Interrupted. The same command goes on where it was." in said
        assert "Traceback" not in said
        assert not list((tmp_path / "out").glob(".tmp/*.parquet"))
    result = run_score(tmp_path / "rollouts", tmp_path / "out", STORED)
    assert (result.done, result.shards, result.complete) == (published, 60 - published, True)
    assert not list((tmp_path / "out").glob(".tmp/*.parquet"))


# ---- what cannot be meant


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--devices", "cpu,0"), "scores of unlike devices are not those of one run"),
        (("--devices", "one,two"), "is not a list of GPUs like 0,1"),
        (("--devices", "cpu,cpu", "--device", "cpu"), "--devices and --device exclude each other"),
        (("--devices", "cpu,cpu", "--device-map", "auto"), "--devices and --device-map exclude each other"),
        (("--batch-invariant", "--sharing", "tree"), "--sharing tree does not"),
        (("--noise-floor", "-1%"), "is not above 0"),
        (("--noise-floor", "some"), "is not a share like 1% or 0.01"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_flags_that_contradict_each_other_are_usage_errors_before_anything_is_loaded(
    run: Run, rollouts: Path, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    outcome = run("score", rollouts, "--model", tmp_path / "none", *flags, "-o", tmp_path / "out")
    assert outcome.code == 2, outcome.err
    assert said in outcome.err
    assert not (tmp_path / "out").exists()


def test_devices_share_out_shards_of_which_a_stream_has_none(run: Run, rollouts: Path, tmp_path: Path) -> None:
    flags = ("--trainer-logprobs", "stored", "--devices", "cpu,cpu")
    for arguments in ((rollouts, "-o", "-"), ("-", "-o", tmp_path / "out")):
        outcome = run("score", *arguments, *flags)
        assert outcome.code == 2
        assert "--devices share out whole shards" in outcome.err
        assert outcome.out == b""
    single = run("score", rollouts, "--trainer-logprobs", "stored", "--devices", "cpu", "-o", "-")
    assert single.code == 0
    assert pa.ipc.open_stream(single.out).read_all().num_rows == 12


def test_settings_that_change_no_figure_do_not_tell_runs_apart_and_the_others_do(
    checkpoint: Path, tmp_path: Path
) -> None:
    # GIVEN a folder of scores
    write_shards(tmp_path / "rollouts", 1, 3)
    options = ScoreOptions(model=checkpoint)
    run_score(tmp_path / "rollouts", tmp_path / "out", options)
    # THEN where and how often it is measured does not matter
    same = replace(options, devices=("cpu",), noise_floor=0.0)
    assert run_score(tmp_path / "rollouts", tmp_path / "out", same).done == 1
    # AND what moves the last bits does, by its own name
    for name, value in (("batch_invariant", True), ("sharing", "padded"), ("max_tokens", 64)):
        with pytest.raises(AuditError, match=rf"was made with another {name} \(fingerprint"):
            run_score(tmp_path / "rollouts", tmp_path / "out", replace(options, **{name: value}))


def test_runs_are_told_apart_by_how_they_share_prefixes_not_by_what_the_check_measured(tmp_path: Path) -> None:
    sharing = {"rung": "tree", "check": 1.1e-6, "refused": {}}
    run = {"kind": "scores", "fingerprint": "a", "dtype": "bfloat16", "sharing": sharing, "noise_floor": {"num": 8}}
    with OutputFolder(tmp_path / "out", run) as folder, folder.shard("x.parquet", head("scores", fingerprint="x")) as x:
        x.write(pa.RecordBatch.from_pydict({"x": [1]}))
        x.close({})
    measured = {"sharing": {**sharing, "check": 1.2e-6}, "noise_floor": {"num": 9}}
    other = {**run, **measured, "fingerprint": "b"}
    for more, said in (({"dtype": "float32"}, "dtype"), ({"sharing": {**sharing, "rung": "padded"}}, "sharing")):
        with pytest.raises(AuditError, match=f"another {said} "):
            OutputFolder(tmp_path / "out", {**other, **more})
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == run
