"""An output folder survives whatever ends its writer, and says so when it is not this run's."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run
from some_rollouts import rollout, write_shard

from trm_audit.criteria.thresholds import Criteria
from trm_audit.errors import BadInput, OutputError, UsageError
from trm_audit.pipeline.filter import FilterOptions, FilterResult, filter_scores
from trm_audit.pipeline.progress import Silent
from trm_audit.pipeline.score import ScoreOptions, ScoreResult, score
from trm_audit.shards.publish import OutputFolder
from trm_audit.shards.write import head

STORED = ScoreOptions(trainer_logprobs="stored")
DELTA = FilterOptions(Criteria(delta_max=1e-3))


class Killed(BaseException):
    """Stands for whatever ends a process: not an Exception, so nothing handles it."""


class EndsAfter(Silent):
    """Watches a stage and ends it after so many batches: their rows are written, their shard is not yet published."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def advance(self, tokens: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


def contents(folder: Path) -> dict[str, pa.Table]:
    return {file.name: pq.read_table(file).replace_schema_metadata() for file in sorted((folder / "data").iterdir())}


def run_score(rollouts: Path, output: Path, **settings: object) -> ScoreResult:
    return score([str(rollouts)], str(output), ScoreOptions(trainer_logprobs="stored", **settings))  # type: ignore[arg-type]


def run_filter(scores: Path, output: Path) -> FilterResult:
    return filter_scores([str(scores)], str(output), DELTA)


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_run_that_was_ended_in_any_shard_goes_on_to_the_same_output(
    rollouts: Path, tmp_path: Path, batches: int
) -> None:
    # GIVEN a run that ends while its shard number `batches` is in flight
    with pytest.raises(Killed):
        score([str(rollouts)], str(tmp_path / "out"), STORED, progress=EndsAfter(batches))
    assert sorted(contents(tmp_path / "out")) == [f"part-{k}.parquet" for k in range(batches)]
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    # WHEN the same command runs again
    result = run_score(rollouts, tmp_path / "out")
    # THEN only what was not there is done, and the output is that of a run that nothing disturbed
    assert (result.done, result.shards, result.complete) == (batches, 3 - batches, True)
    run_score(rollouts, tmp_path / "undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert not list((tmp_path / "out" / ".tmp").glob("*.parquet"))


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_filter_goes_on_where_it_was(sampled_scores: Path, tmp_path: Path, batches: int) -> None:
    with pytest.raises(Killed):
        filter_scores([str(sampled_scores)], str(tmp_path / "out"), DELTA, progress=EndsAfter(batches))
    result = run_filter(sampled_scores, tmp_path / "out")
    whole = run_filter(sampled_scores, tmp_path / "undisturbed")
    assert (result.done, result.shards) == (batches, 3 - batches)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert result.counts() == whole.counts()  # those of shards that were there before included


def test_finished_shards_are_not_touched_again(rollouts: Path, tmp_path: Path) -> None:
    run_score(rollouts, tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "data").iterdir()}
    again = run_score(rollouts, tmp_path / "out")
    assert (again.done, again.shards, again.rows, again.complete) == (3, 0, 0, True)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "data").iterdir()} == before


def test_a_shard_that_was_renamed_but_not_noted_is_noted_by_the_next_run(rollouts: Path, tmp_path: Path) -> None:
    # GIVEN a folder whose writer died between the rename and the manifest line, and one that died within the line
    run_score(rollouts, tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.jsonl"
    whole = manifest.read_text().splitlines(keepends=True)
    manifest.write_text(whole[0] + whole[1][:-20])
    # WHEN the command runs again
    result = run_score(rollouts, tmp_path / "out")
    # THEN nothing is scored again and every shard has a line that can be read
    assert (result.done, result.shards) == (3, 0)
    with OutputFolder(tmp_path / "out", json.loads((tmp_path / "out" / "run.json").read_text())) as folder:
        assert folder.manifest() == {line["name"]: line for line in map(json.loads, whole)}


KILL = """
import os, signal, sys
from trm_audit.criteria.thresholds import Criteria
from trm_audit.pipeline.filter import FilterOptions, filter_scores
from trm_audit.pipeline.progress import Silent

class Kill(Silent):
    left = int(sys.argv[3])
    def advance(self, tokens):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

filter_scores([sys.argv[1]], sys.argv[2], FilterOptions(Criteria(delta_max=1e-3)), progress=Kill())
"""


def test_sigkill_within_a_shard_loses_nothing(sampled_scores: Path, tmp_path: Path) -> None:
    # GIVEN a process that SIGKILL ends in its second shard: nothing of it can tidy up
    killed = subprocess.run([sys.executable, "-c", KILL, sampled_scores, tmp_path / "out", "1"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "out" / ".tmp").glob("*.parquet"))
    # WHEN the same command runs again THEN the output is as if it had not happened, and nothing lies about
    assert run_filter(sampled_scores, tmp_path / "out").done == 1
    run_filter(sampled_scores, tmp_path / "undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert not list((tmp_path / "out" / ".tmp").glob("*.parquet"))


def interrupted(rollouts: Path, out: Path) -> tuple[int, str]:
    """Exit code and stderr of a command that gets Ctrl-C when its first shard is there."""
    command = [
        Path(sys.executable).with_name("trm-audit"),
        "score",
        rollouts,
        "--trainer-logprobs",
        "stored",
        "-o",
        out,
    ]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    patience = time.monotonic() + 60
    while not list((out / "data").glob("*.parquet")) and time.monotonic() < patience:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    # GIVEN 60 shards of which some are scored
    for k in range(60):
        row = rollout(k)
        row["trainer_logprobs"] = row["rollout_logprobs"]
        write_shard(tmp_path / "rollouts" / f"part-{k:03d}.parquet", [row])
    # WHEN Ctrl-C is pressed (again, should the command have been done before this process had its turn)
    code, said = 0, ""
    for attempt in range(5):
        out = tmp_path / f"out-{attempt}"
        code, said = interrupted(tmp_path / "rollouts", out)
        if code:
            break
    # THEN it says what to do, and the same command finishes without repeating what is published
    assert code == 130
    assert "Interrupted. The same command goes on where it was." in said
    assert "Traceback" not in said
    published = len(contents(out))
    assert 0 < published < 60
    result = run_score(tmp_path / "rollouts", out)
    assert (result.done, result.shards, result.complete) == (published, 60 - published, True)


def test_other_settings_in_the_same_folder_are_refused(run: Run, rollouts: Path, tmp_path: Path) -> None:
    arguments = ("score", rollouts, "--trainer-logprobs", "stored", "-o", tmp_path / "out")
    assert run(*arguments).code == 0
    before = contents(tmp_path / "out")
    other = run(*arguments, "--trainer-version", "3")
    assert other.code == 3
    assert f"{tmp_path / 'out'}: was made with another trainer_version (fingerprint " in other.err
    assert "--overwrite" in other.err
    assert contents(tmp_path / "out") == before


def test_overwrite_replaces_another_run(rollouts: Path, tmp_path: Path) -> None:
    run_score(rollouts, tmp_path / "out")
    (rollouts / "part-2.parquet").unlink()
    result = run_score(rollouts, tmp_path / "out", trainer_version=3, overwrite=True)
    assert (result.done, result.shards, result.complete) == (0, 2, True)
    assert sorted(contents(tmp_path / "out")) == ["part-0.parquet", "part-1.parquet"]
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == 2


def test_input_that_changed_is_noticed_and_overwrite_scores_it_again(rollouts: Path, tmp_path: Path) -> None:
    run_score(rollouts, tmp_path / "out")
    row = rollout(77)
    write_shard(rollouts / "part-1.parquet", [{**row, "trainer_logprobs": row["rollout_logprobs"]}])
    with pytest.raises(BadInput, match=r"part-1\.parquet: was made from other input(.|\n)*--overwrite"):
        run_score(rollouts, tmp_path / "out")
    result = run_score(rollouts, tmp_path / "out", overwrite=True)
    assert (result.done, result.shards, result.complete) == (2, 1, True)
    assert contents(tmp_path / "out")["part-1.parquet"]["rollout_id"].to_pylist() == ["r0077"]


def test_a_foreign_folder_is_refused_and_left_alone(run: Run, rollouts: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("\\section{}")
    for more in ((), ("--overwrite",)):
        outcome = run("score", rollouts, "--trainer-logprobs", "stored", "-o", foreign, *more)
        assert outcome.code == 3
        assert "is not empty and was not written by trm-audit" in outcome.err
        assert [file.name for file in foreign.iterdir()] == ["chapter1.tex"]


@pytest.mark.parametrize("below", ["", "/scores"])
def test_an_output_that_cannot_be_a_folder_is_refused(run: Run, rollouts: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    outcome = run("score", rollouts, "--trainer-logprobs", "stored", "-o", f"{tmp_path}/file{below}")
    assert outcome.code == 3
    assert f"{tmp_path}/file{below}" in outcome.err
    assert "another -o" in outcome.err


def test_a_second_writer_is_refused_while_the_first_writes(run: Run, rollouts: Path, tmp_path: Path) -> None:
    arguments = ("score", rollouts, "--trainer-logprobs", "stored", "-o", tmp_path / "out")
    assert run(*arguments).code == 0
    with OutputFolder(tmp_path / "out", json.loads((tmp_path / "out" / "run.json").read_text())):
        for part in ((), ("--part", "1/2")):
            second = run(*arguments, *part)
            assert second.code == 2
            assert "another process is writing here" in second.err
            assert "--part" in second.err
    assert run(*arguments).code == 0


def test_two_parts_make_the_whole_and_the_last_one_says_so(rollouts: Path, tmp_path: Path) -> None:
    first = run_score(rollouts, tmp_path / "out", part=(1, 2))
    assert (first.shards, first.complete) == (2, False)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    second = run_score(rollouts, tmp_path / "out", part=(2, 2))
    assert (second.shards, second.done, second.complete) == (1, 0, True)
    whole = run_score(rollouts, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert first.rows + second.rows == whole.rows
    success = json.loads((tmp_path / "out" / "_SUCCESS").read_text())
    assert success == json.loads((tmp_path / "whole" / "_SUCCESS").read_text())


def test_parts_can_write_at_the_same_time(rollouts: Path, tmp_path: Path) -> None:
    run_score(rollouts, tmp_path / "out", part=(1, 2))
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    with OutputFolder(tmp_path / "out", settings, part=(1, 2)):
        assert run_score(rollouts, tmp_path / "out", part=(2, 2)).complete
        with pytest.raises(UsageError, match="another process is writing here"):
            run_score(rollouts, tmp_path / "out")


def test_parts_with_a_bad_shard_left_out_are_complete_too(rollouts: Path, tmp_path: Path) -> None:
    damage(rollouts / "part-0.parquet")
    first = run_score(rollouts, tmp_path / "out", part=(1, 2), skip_bad=True)
    second = run_score(rollouts, tmp_path / "out", part=(2, 2), skip_bad=True)
    assert (first.complete, second.complete) == (False, True)


def test_data_holds_parquet_only_and_the_rest_stands_beside_it(rollouts: Path, tmp_path: Path) -> None:
    run_score(rollouts, tmp_path / "out")
    assert {file.suffix for file in (tmp_path / "out" / "data").iterdir()} == {".parquet"}
    beside = {"data", "run.json", "manifest.jsonl", "_SUCCESS", ".tmp"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == beside


def test_manifest_footer_and_success_tell_the_same_story(rollouts: Path, tmp_path: Path) -> None:
    run_score(rollouts, tmp_path / "out")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    success = json.loads((tmp_path / "out" / "_SUCCESS").read_text())
    for line in map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()):
        file = tmp_path / "out" / "data" / line["name"]
        footer = pq.read_metadata(file).metadata
        assert footer[b"trm_audit.fingerprint"].decode() == line["fingerprint"]
        assert json.loads(footer[b"trm_audit.counts"]) == line["counts"]
        assert json.loads(footer[b"trm_audit.run"]) == run
        assert (line["rows"], line["bytes"]) == (4, file.stat().st_size)
    assert success["shards"] == sorted(contents(tmp_path / "out"))
    assert success["fingerprint"] == run["fingerprint"]


def damage(file: Path) -> None:
    """Flips the last byte of the first column's data page."""
    chunk = pq.ParquetFile(file).metadata.row_group(0).column(0)
    content = bytearray(file.read_bytes())
    content[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 1] ^= 1
    file.write_bytes(content)


def test_a_flipped_byte_of_a_published_shard_is_noticed(rollouts: Path, tmp_path: Path) -> None:
    run_score(rollouts, tmp_path / "out")
    damage(tmp_path / "out" / "data" / "part-1.parquet")
    with pytest.raises(BadInput, match=r"part-1\.parquet: is damaged after 0 rows"):
        run_filter(tmp_path / "out", tmp_path / "train")


@contextlib.contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """A disk that is full for every file beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_that_keeps_what_is_published(rollouts: Path, tmp_path: Path) -> None:
    # GIVEN shards of which the last is too large for the disk
    rows = [rollout(i, length=40, note=os.urandom(4000)) for i in range(100, 140)]
    write_shard(rollouts / "part-3.parquet", [{**row, "trainer_logprobs": row["rollout_logprobs"]} for row in rows])
    # WHEN they are scored THEN the error names the file and the way out, and the shards before it stay
    with files_at_most(100_000), pytest.raises(OutputError, match=r"part-3\.parquet: cannot be written") as caught:
        run_score(rollouts, tmp_path / "out")
    assert "Make room" in caught.value.next_step
    assert caught.value.exit_code == 3
    assert sorted(contents(tmp_path / "out")) == [f"part-{k}.parquet" for k in range(3)]
    assert not list((tmp_path / "out" / ".tmp").glob("*.parquet"))
    assert run_score(rollouts, tmp_path / "out").done == 3


@pytest.mark.parametrize("size", [0, 200, 2000])
def test_a_disk_that_is_full_from_the_start_is_the_same_error(rollouts: Path, tmp_path: Path, size: int) -> None:
    with files_at_most(size), pytest.raises(OutputError, match="cannot be written"):
        run_score(rollouts, tmp_path / "out")
    assert run_score(rollouts, tmp_path / "out").complete


def test_a_shard_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def fail_within(folder: OutputFolder) -> None:
        with folder.shard("a.parquet", head("scores", fingerprint="f")) as sink:
            sink.write(pa.RecordBatch.from_pydict({"x": np.arange(9)}))
            raise Killed

    with OutputFolder(tmp_path / "out", {"fingerprint": "f"}) as folder, pytest.raises(Killed):
        fail_within(folder)
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_what_skip_bad_left_out_is_noted_once_however_often_it_runs(rollouts: Path, tmp_path: Path) -> None:
    row = rollout(50)
    bad = {**rollout(51), "trainer_logprobs": [0.5] * len(rollout(51)["response_ids"])}
    write_shard(rollouts / "part-3.parquet", [{**row, "trainer_logprobs": row["rollout_logprobs"]}, bad])
    (rollouts / "part-4.parquet").write_bytes(b"not parquet")
    for _ in range(2):
        result = run_score(rollouts, tmp_path / "out", skip_bad=True)
        assert (result.num_skipped, result.bad_shards) == (1, 1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["place"].rpartition("/")[2] for line in lines) == [
        "part-3.parquet, row 1 (rollout_id=r0051)",
        "part-4.parquet",
    ]
