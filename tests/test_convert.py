"""convert and export from the command line: captured answers and dumps in, rollout shards and files of trainers out."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import Run
from export_rows import training_folder

import trm_audit
from trm_audit.adapters import SOURCES, TARGETS, load_source, load_target
from trm_audit.rollout import GRADES

CAPTURES = Path(__file__).parent / "data" / "captures"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_source_says_what_it_reads_and_what_to_switch_on(name: str) -> None:
    found = load_source(name)
    assert found.name == name
    assert found.about
    assert found.switch_on
    assert found.grade in GRADES
    assert all(suffix.startswith(".") for suffix in found.suffixes)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_target_says_what_it_writes(name: str) -> None:
    assert load_target(name).about


def test_answers_of_vllm_become_shards_that_are_valid(run: Run, tmp_path: Path) -> None:
    file = CAPTURES / "vllm-ids.jsonl"
    found = run("convert", file, "--from", "vllm", "--logprobs-mode", "raw", "-o", tmp_path / "rollouts")
    assert found.code == 0, found.err
    result = trm_audit.validate([str(tmp_path / "rollouts")], trm_audit.ValidateOptions())
    assert result.errors == []
    assert f"{result.rows} rollouts, {result.num_tokens} policy tokens in 1 shards" in found.err
    footer = pq.read_metadata(tmp_path / "rollouts" / "data" / "vllm-ids.parquet").metadata
    counts = json.loads(footer[b"trm_audit.counts"])
    assert counts["rows"] == result.rows
    assert all(f"Assumed: {sentence}" in found.err for sentence in counts["assumed"])


def test_the_same_command_again_does_nothing_and_another_one_is_refused(run: Run, tmp_path: Path) -> None:
    command = ("convert", CAPTURES / "vllm-ids.jsonl", "--from", "vllm", "-o", tmp_path / "rollouts")
    assert run(*command, "--logprobs-mode", "raw").code == 0
    shard = tmp_path / "rollouts" / "data" / "vllm-ids.parquet"
    made = shard.stat().st_mtime_ns
    again = run(*command, "--logprobs-mode", "raw")
    assert (again.code, shard.stat().st_mtime_ns) == (0, made)
    assert "in 1 shards" in again.err
    other = run(*command, "--logprobs-mode", "processed")
    assert other.code == 3
    assert "was made with another given" in other.err


def test_a_file_twice_is_a_rollout_id_twice(run: Run, tmp_path: Path) -> None:
    text = (CAPTURES / "vllm-ids.jsonl").read_text("utf-8")
    for folder in ("a", "b"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        (tmp_path / "raw" / folder / "same.jsonl").write_text(text, "utf-8")
    found = run("convert", tmp_path / "raw", "--from", "vllm", "--logprobs-mode", "raw", "-o", tmp_path / "out")
    assert found.code == 3
    assert "rollout_id" in found.err


def test_answers_that_cannot_be_rows_are_left_out_one_by_one(run: Run, tmp_path: Path) -> None:
    good, bad = (CAPTURES / f"llamacpp-{name}.jsonl" for name in ("completion", "missing"))
    command = ("convert", good, bad, "--from", "llama-cpp", "-o", tmp_path / "out")
    stopped = run(*command)
    assert stopped.code == 3
    assert "have no log-probability" in stopped.err
    found = run(*command, "--skip-bad")
    assert found.code == 4, found.err
    assert "inside a character" in (tmp_path / "out" / "skipped.jsonl").read_text("utf-8")
    rows = trm_audit.validate([str(tmp_path / "out")], trm_audit.ValidateOptions()).rows
    assert rows == len(good.read_text("utf-8").splitlines())


def test_text_is_refused_with_what_to_switch_on(run: Run, tmp_path: Path) -> None:
    found = run("convert", CAPTURES / "llamacpp-python.jsonl", "--from", "llama-cpp", "-o", tmp_path / "out")
    assert found.code == 3
    assert "LlamaRecorder" in found.err
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_folder_without_files_of_the_format_is_named(run: Run, tmp_path: Path) -> None:
    found = run("convert", tmp_path, "--from", "slime", "-o", tmp_path / "out")
    assert found.code == 3
    assert "holds no .pt" in found.err


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_exports_appear_whole_and_are_not_overwritten_by_accident(run: Run, tmp_path: Path, name: str) -> None:
    train, out = training_folder(tmp_path), tmp_path / "out"
    found = run("export", train, "--to", name, "-o", out)
    assert found.code == 0, found.err
    about = json.loads((out / "export.json").read_text("utf-8"))
    assert about["target"] == name
    assert about["factor"] == about["n_kept"] / about["n_total"]
    assert all(sentence in found.err.replace("\n", " ") for sentence in about["remarks"])
    assert run("export", train, "--to", name, "-o", out).code == 2
    assert run("export", train, "--to", name, "-o", out, "--overwrite").code == 0
    assert [each.name for each in tmp_path.glob(".out*")] == []


def test_a_folder_of_somebody_else_is_left_alone(run: Run, tmp_path: Path) -> None:
    train, out = training_folder(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    found = run("export", train, "--to", "slime", "-o", out, "--overwrite")
    assert found.code == 3
    assert (out / "notes.txt").read_text() == "mine"


def test_a_file_that_comes_later_is_held_against_shards_that_were_there(run: Run, tmp_path: Path) -> None:
    text = (CAPTURES / "vllm-ids.jsonl").read_text("utf-8")
    command = ("convert", tmp_path / "raw", "--from", "vllm", "--logprobs-mode", "raw", "-o", tmp_path / "out")
    for folder in ("a", "b"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        (tmp_path / "raw" / folder / "same.jsonl").write_text(text, "utf-8")
        found = run(*command)
        assert found.code == (0 if folder == "a" else 3)
    assert "rollout_id" in found.err


def test_shards_of_files_that_are_gone_are_passed_over_by_what_reads_the_folder(
    run: Run, tmp_path: Path, checkpoint: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{name}.jsonl").write_text((CAPTURES / "vllm-ids.jsonl").read_text("utf-8"), "utf-8")
    command = ("convert", tmp_path / "raw", "--from", "vllm", "--logprobs-mode", "raw", "-o", tmp_path / "out")
    assert run(*command).code == 0
    (tmp_path / "raw" / "b.jsonl").unlink()
    assert run(*command).code == 0
    found = run("score", tmp_path / "out", "--model", checkpoint, "-o", tmp_path / "scores")
    assert "b.parquet is passed over: what it was made of is not among the finished run's input" in found.err
