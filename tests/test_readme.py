"""What the README shows is what runs."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pyarrow as pa
import pytest
import torch
from models import tiny_model

import trm_audit
from trm_audit.cli import cli
from trm_audit.pipeline.filter import FilterOptions, filter_scores
from trm_audit.pipeline.score import score
from trm_audit.pipeline.trainer import ScoreOptions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
TINY = ROOT / "sample_data" / "tiny"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def flags(line: str) -> tuple[str, list[str]]:
    words = line.split("#")[0].split()
    at = words.index("trm-audit")
    return words[at + 1], [word for word in words[at + 2 :] if word.startswith("--")]


def test_every_command_line_of_the_readme_names_a_command_and_flags_that_exist() -> None:
    lines = [part for block in blocks("bash") for line in block.splitlines() for part in line.split("|")]
    shown = [flags(part) for part in lines if "trm-audit" in part.split("#")[0]]
    assert {name for name, _ in shown} >= {"score", "filter", "report", "validate", "bounds"}
    for name, used in shown:
        command = cli.commands[name]
        known = {opt for p in command.params if isinstance(p, click.Option) for opt in p.opts}
        assert set(used) <= known, name


def test_the_lines_that_read_a_stream_read_what_filter_writes(tmp_path: Path) -> None:
    # GIVEN the stream that `score | filter` ends with
    scores, stream = str(tmp_path / "scores"), io.BytesIO()
    score([str(TINY)], scores, ScoreOptions(model=TINY / "model", limit=5))
    filter_scores([scores], stream, FilterOptions(trm_audit.Criteria(delta_max=0.05)))
    # WHEN the README's script reads it from stdin
    (script,) = (block for block in blocks("python") if "sys.stdin" in block)
    assert len([line for line in script.splitlines() if line.strip()]) == 5
    out = subprocess.run([sys.executable, "-c", script], input=stream.getvalue(), capture_output=True, check=True)
    # THEN it sees every row
    batches = pa.ipc.open_stream(stream.getvalue()).read_all()
    assert [line.split()[0] for line in out.stdout.decode().splitlines()] == batches.column("rollout_id").to_pylist()


def test_the_demo_gives_the_numbers_that_the_readme_shows(tmp_path: Path) -> None:
    scores = str(tmp_path / "scores")
    scored = score([str(TINY)], scores, ScoreOptions(model=TINY / "model", trainer_version=200))
    criteria = trm_audit.Criteria(delta_max=0.05, delta_avg=0.002)
    kept = filter_scores([scores], str(tmp_path / "train"), FilterOptions(criteria))
    summary = trm_audit.summarize([scores], trm_audit.ReportOptions(criteria))
    assert f"scored {scored.rows} rollouts, {scored.num_tokens:,} tokens in {scored.shards} shards" in README
    assert f"kept {kept.n_kept} of {kept.n_total} sequences" in README
    assert summary.verdict.split(". ")[0] in README
    bound = summary.bounds["all"]["exact"].bounds["adaptive_bound"]
    assert f"adaptive_bound = {bound.published:.4g} (sharp {bound.sharp:.4g})" in README


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_pages_import_is_there(page: Path) -> None:
    lines = re.findall(r"(?m)^from (trm_audit[\w.]*) import ([\w, ]+)$", page.read_text("utf-8"))
    for module, names in lines:
        for name in names.split(", "):
            assert hasattr(import_module(module), name), (module, name)


def test_the_lines_that_record_make_a_shard_that_can_be_audited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # GIVEN a model, two prompts and a reward for each response
    (script,) = (block for block in blocks("python") if "GenerateRecorder" in block)
    inputs = {"input_ids": torch.tensor([[3, 5, 2], [4, 9, 8]]), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    monkeypatch.chdir(tmp_path)
    # WHEN the README's lines run
    exec(
        compile(script.replace("256", "8"), "README.md", "exec"),
        {"model": tiny_model("llama"), "inputs": inputs, "rewards": [1.0, 0.0]},
    )
    # THEN two rollouts of grade sketch are there
    result = trm_audit.validate(["rollouts/"], trm_audit.ValidateOptions())
    assert (dict(result.grades), result.errors) == ({"sketch": 2}, [])


def test_the_rows_that_the_readme_writes_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = (block for block in blocks("python") if "write_rollout_table(" in block)
    (tmp_path / "rollouts").mkdir()
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "README.md", "exec"), {})
    result = trm_audit.validate(["rollouts/"], trm_audit.ValidateOptions())
    assert (result.rows, result.errors) == (1, [])


def test_names_of_the_python_section_exist() -> None:
    used = set(re.findall(r"\btrm_audit\.(\w+)", re.sub(r"(?m)^from .*$", "", "\n".join(blocks("python")))))
    assert used <= set(trm_audit.__all__)
    assert {"score", "filter_scores", "summarize", "divergences", "error_bounds"} <= used


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert os.path.exists(ROOT / target), target
