"""The command line as a user meets it: options, exit codes, terminals, pipes that close, disks that fill."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run
from some_rollouts import Row, rollout, write_shard, write_shards

from trm_audit.shards.write import head

COMMAND = str(Path(sys.executable).with_name("trm-audit"))
if not Path(COMMAND).exists():
    COMMAND = f"{sys.executable} -m trm_audit"
DELTA = ("--delta-max", "0.05")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((folder / "data").iterdir()) for row in pq.read_table(file).to_pylist()]


def with_trainer(row: Row) -> Row:
    return {**row, "trainer_logprobs": [value - 0.02 for value in row["rollout_logprobs"]]}


def shell(line: str, **names: object) -> subprocess.CompletedProcess[bytes]:
    """A line of bash with the words of `names` filled in; fails if any command of a pipe does."""
    words = {"trm": COMMAND, **{name: str(value) for name, value in names.items()}}
    return subprocess.run(["bash", "-o", "pipefail", "-c", line.format(**words)], capture_output=True, timeout=120)


# ---- exit codes and messages


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("score", "x", "-o", "y"), "give either --model DIR or --trainer-logprobs stored"),
        (("score", "x", "-o", "y", "--model", "m", "--trainer-logprobs", "stored"), "give either"),
        (("score", "x", "-o", "y", "--sample", "0"), "is not above 0"),
        (("score", "x", "-o", "y", "--sample", "many"), "is not a share like 1% or 0.01"),
        (("score", "x", "-o", "y", "--part", "3/2"), "is not i/n with 1 <= i <= n"),
        (("score", "x", "-o", "y", "--column", "a"), "is not OURS=THEIRS"),
        (("score", "x", "--model", "m"), "-o"),
        (("filter", "x", "-o", "y"), "thresholds have no default"),
        (("filter", "x", "-o", "y", "--delta-max", "-1"), "is no threshold"),
        (("filter", "x", "-o", "y", "--keep", "__import__('os')"), "'"),
        (("bounds", "--horizon", "8"), ""),
        (("bounds", "--kl-max", "1"), "Missing option"),
        (("nonsense",), "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_command_that_means_nothing_is_exit_code_2(run: Run, tmp_path: Path, arguments: Any, said: str) -> None:
    write_shard(tmp_path / "x.parquet", [rollout(0)])
    filled = [
        tmp_path / f"{word}.parquet" if word == "x" else tmp_path / word if word == "y" else word for word in arguments
    ]
    outcome = run(*filled)
    assert outcome.code == 2, outcome.err
    assert said in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "y").exists()


def test_a_failed_gate_is_exit_code_1_after_the_report(run: Run, sampled_scores: Path) -> None:
    outcome = run("report", sampled_scores, *DELTA, "--json", "--fail-on", "acceptance<=1")
    assert outcome.code == 1
    assert json.loads(outcome.out)["counts"]["n_total"] == 24
    assert "--fail-on" in outcome.err
    assert run("report", sampled_scores, *DELTA, "--json", "--fail-on", "acceptance<0").code == 0


def test_a_fault_of_ours_is_exit_code_70_without_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from trm_audit import cli

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(cli.cli.commands["bounds"], "callback", broken)
    outcome = run("bounds", "--horizon", "8")
    assert outcome.code == 70
    assert "Internal error: ZeroDivisionError: division by zero" in outcome.err
    assert "TRM_AUDIT_TRACEBACK=1" in outcome.err
    assert "Traceback" not in outcome.err
    monkeypatch.setenv("TRM_AUDIT_TRACEBACK", "1")
    assert run("bounds", "--horizon", "8").code == 70


# ---- options of score


def test_limit_takes_the_first_rows(run: Run, rollouts: Path, tmp_path: Path) -> None:
    outcome = run("score", rollouts, "--trainer-logprobs", "stored", "--limit", "6", "-o", tmp_path / "out")
    assert outcome.code == 0
    assert [row["rollout_id"] for row in rows_of(tmp_path / "out")] == [f"r{i:04d}" for i in range(6)]
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_sample_takes_whole_groups_and_the_same_every_time(run: Run, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [with_trainer(rollout(i)) for i in range(80)])
    names = []
    for output in ("one", "two"):
        arguments = ("--trainer-logprobs", "stored", "--sample", "40%", "-o", tmp_path / output)
        assert run("score", tmp_path / "a.parquet", *arguments).code == 0
        names.append([(row["rollout_id"], row["group_id"]) for row in rows_of(tmp_path / output)])
    assert names[0] == names[1]
    groups = [group for _, group in names[0]]
    assert 0 < len(groups) < 80
    assert {groups.count(group) for group in groups} == {4}


def test_columns_of_another_trainer_are_read_under_our_names(run: Run, tmp_path: Path) -> None:
    table = {
        "rollout_id": "uid",
        "prompt_ids": "prompts",
        "response_ids": "responses",
        "rollout_logprobs": "old_log_probs",
    }
    write_shard(tmp_path / "plain" / "a.parquet", [with_trainer(rollout(i)) for i in range(3)])
    ours = pq.read_table(tmp_path / "plain" / "a.parquet").replace_schema_metadata()
    (tmp_path / "theirs").mkdir()
    theirs = ours.rename_columns([table.get(name, name) for name in ours.column_names])
    pq.write_table(theirs, tmp_path / "theirs" / "a.parquet")
    renames = [word for ours, theirs in table.items() for word in ("--column", f"{ours}={theirs}")]
    stored = ("--trainer-logprobs", "stored")
    assert run("score", tmp_path / "theirs", *stored, *renames, "-o", tmp_path / "two").code == 0
    assert run("score", tmp_path / "plain", *stored, "-o", tmp_path / "one").code == 0
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")


def test_stored_trainer_values_give_the_log_ratio_without_a_model(run: Run, rollouts: Path, tmp_path: Path) -> None:
    outcome = run("score", rollouts, "--trainer-logprobs", "stored", "-o", tmp_path / "out")
    assert "12 sampled" in outcome.err
    for row in rows_of(tmp_path / "out"):
        np.testing.assert_allclose(row["log_ratio"], [-0.02] * len(row["response_ids"]), atol=1e-6)
        assert (row["grade"], row["kl"]) == ("sampled", None)


def test_with_a_model_stored_trainer_values_are_kept_beside_its_own(
    run: Run, rollouts: Path, checkpoint: Path, tmp_path: Path
) -> None:
    assert run("score", rollouts, "--model", checkpoint, "-o", tmp_path / "out").code == 0
    for row in rows_of(tmp_path / "out"):
        expected = np.array(row["rollout_logprobs"]) - 0.02
        np.testing.assert_allclose(row["trainer_logprobs_stored"], expected, atol=1e-6)
        assert row["trainer_logprobs"] != row["trainer_logprobs_stored"]


def test_grades_share_a_shard_and_each_row_has_the_columns_of_its_own(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    rows = [rollout(0, "exact"), rollout(1), rollout(2, "interval"), rollout(3, length=0)]
    write_shard(tmp_path / "a.parquet", rows)
    outcome = run("score", tmp_path / "a.parquet", "--model", checkpoint, "-o", tmp_path / "out")
    assert "1 exact; 1 interval; 1 sampled" in outcome.err
    exact, sampled, interval, empty = rows_of(tmp_path / "out")
    assert [row["grade"] for row in (exact, sampled, interval)] == ["exact", "sampled", "interval"]
    for row, has in ((exact, "kl"), (interval, "kl_upper"), (sampled, None)):
        for name in ("kl", "kl_upper"):
            assert (row[name] is not None) == (name == has)
        assert row["trainer_entropy"] is not None
    assert (empty["num_tokens"], empty["seq_max_k3"], empty["seq_argmax_k3"]) == (0, None, None)
    for row in (exact, interval):
        for value, position in ((row["seq_max_k3"], row["seq_argmax_k3"]),):
            lr = row["log_ratio"][position]
            assert value == pytest.approx(np.expm1(lr) - lr, rel=1e-4)


def test_staleness_is_measured_against_the_trainers_version(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [rollout(i, policy_version=version) for i, version in enumerate((3, 7, None))])
    per_token = {**rollout(3, length=3), "policy_version": [6, 4, 5]}
    write_shard(tmp_path / "b.parquet", [per_token])
    arguments = ("score", tmp_path / "a.parquet", tmp_path / "b.parquet", "--model", checkpoint)
    assert run(*arguments, "--trainer-version", "7", "-o", tmp_path / "with").code == 0
    assert run(*arguments, "-o", tmp_path / "without").code == 0
    assert [row["staleness"] for row in rows_of(tmp_path / "with")] == [4, 0, None, 3]
    assert [row["staleness"] for row in rows_of(tmp_path / "without")] == [None] * 4


def test_a_dry_run_counts_and_writes_nothing(run: Run, rollouts: Path, tmp_path: Path) -> None:
    outcome = run("score", rollouts, "--trainer-logprobs", "stored", "--dry-run", "-o", tmp_path / "out")
    assert outcome.code == 0
    tokens = sum(len(rollout(i)["response_ids"]) for i in range(12))
    assert f"12 rollouts in 3 shards, {tokens} response tokens".encode() in outcome.out
    assert not (tmp_path / "out").exists()


def test_sampling_settings_can_be_given_for_rows_that_do_not_state_them(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    # GIVEN rows without a temperature, and the same rows with one
    write_shards(tmp_path / "silent", 1, 3)
    write_shards(tmp_path / "stated", 1, 3, temperature=0.5, logprobs_mode="processed")
    settings = ("--temperature", "0.5", "--logprobs-mode", "processed")
    assert run("score", tmp_path / "silent", "--model", checkpoint, *settings, "-o", tmp_path / "one").code == 0
    assert run("score", tmp_path / "stated", "--model", checkpoint, "-o", tmp_path / "two").code == 0
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["trainer_logprobs"] for row in one] == [row["trainer_logprobs"] for row in two]
    refused = run("score", tmp_path / "silent", "--model", checkpoint, "--temperature", "0.5", "-o", tmp_path / "three")
    assert refused.code == 3
    assert "--logprobs-mode raw|tempered|processed" in refused.err


def test_skip_bad_is_exit_code_4_and_says_what_was_left_out(run: Run, rollouts: Path, tmp_path: Path) -> None:
    write_shard(rollouts / "part-3.parquet", [with_trainer(rollout(20)), with_trainer(rollout(21, temperature=-1.0))])
    arguments = ("score", rollouts, "--trainer-logprobs", "stored", "-o", tmp_path / "out")
    assert run(*arguments).code == 3
    outcome = run(*arguments, "--skip-bad")
    assert outcome.code == 4
    assert "left out 1 rows and 0 shards" in outcome.err
    assert len(rows_of(tmp_path / "out")) == 13
    assert run(*arguments, "--skip-bad").code == 4  # and again, when there is nothing left to do


# ---- terminals, pipes and disks (real processes)


@pytest.mark.parametrize("command", ["score", "filter"])
def test_an_arrow_stream_is_not_written_to_a_terminal(command: str, sampled_scores: Path, tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    arguments = ["--trainer-logprobs", "stored"] if command == "score" else list(DELTA)
    line = [*COMMAND.split(), command, str(sampled_scores), *arguments, "-o", "-"]
    try:
        found = subprocess.run(line, stdout=terminal, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(terminal)
        os.close(master)
    assert found.returncode == 2
    assert "-o -: an Arrow stream is binary and this is a terminal" in found.stderr


def test_a_reader_that_closes_the_pipe_ends_the_writer_quietly(tmp_path: Path) -> None:
    # GIVEN a stream much larger than a pipe holds
    rows = [with_trainer(rollout(i, length=60, note="x" * 2000)) for i in range(300)]
    write_shard(tmp_path / "a.parquet", rows)
    line = "{trm} score {file} --trainer-logprobs stored -o - | head -c 100"
    found = shell(line, file=tmp_path / "a.parquet")
    assert found.returncode == 128 + signal.SIGPIPE
    assert len(found.stdout) == 100
    assert b"Traceback" not in found.stderr
    assert b"Error" not in found.stderr


def test_a_full_disk_behind_stdout_is_a_clear_error(sampled_scores: Path) -> None:
    found = shell("{trm} filter {scores} --delta-max 1 -o - > /dev/full", scores=sampled_scores)
    assert found.returncode == 3
    assert b"-o -: the stream cannot be written (No space left on device)" in found.stderr
    assert b"Traceback" not in found.stderr
    assert b"Exception ignored" not in found.stderr


def test_a_pipe_through_all_stages_works_and_a_failure_at_its_head_reaches_its_end(
    exact_scores: Path, tmp_path: Path
) -> None:
    line = "{trm} filter {scores} --delta-max 0.06 -o - | {trm} report - --json"
    found = shell(line, scores=exact_scores)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["counts"]["n_total"] == 24
    failed = shell(line, scores=tmp_path)
    assert failed.returncode == 3
    assert failed.stderr.count(b"Error: ") == 2
    assert failed.stdout == b""


def test_ctrl_c_while_waiting_for_a_pipe_is_exit_code_130(sampled_scores: Path) -> None:
    # GIVEN a filter that has read a first batch, said what decides, and waits for the next
    table = pq.read_table(sampled_scores / "data" / "part-0.parquet")
    stream = io.BytesIO()
    writer = pa.ipc.new_stream(stream, table.schema.with_metadata(head("scores")))
    writer.write_table(table)
    line = [*COMMAND.split(), "filter", "-", *DELTA, "--advantage", "none", "-o", "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(stream.getvalue())
        process.stdin.flush()
        assert b"k2 <= 0.05" in process.stderr.readline()
        # WHEN Ctrl-C is pressed
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    # THEN it ends as interrupted
    assert process.returncode == 130
    assert b"Interrupted" in said
    assert b"Traceback" not in said
