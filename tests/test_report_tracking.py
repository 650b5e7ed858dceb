"""Trackers are given the JSON report's own names and numbers, and nothing of theirs reaches stdout."""

from __future__ import annotations

import functools
import json
import math
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_rows import random_rows, run_with_floor, score_batch

from trm_audit.errors import OutputError, UsageError
from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.compare import Comparison, compare
from trm_audit.report.summary import AuditSummary, Thresholds
from trm_audit.report.tracking import figures, log_to, settings

STAND_IN = """
import json, pathlib, sys

calls = pathlib.Path(__file__).with_name("calls.jsonl")

def note(name, value):
    print("hello from the tracker")
    with calls.open("a") as file:
        file.write(json.dumps([name, value]) + chr(10))

class Run:
    def log(self, figures):
        note("log", figures)
        if "broken" in figures:
            raise RuntimeError("no network")

    def finish(self):
        note("finish", None)

def finish():
    note("finish", None)

def init(project, name=None, config=None, reinit=None):
    note("init", {"project": project, "name": name, "config": config})
    if project == "forbidden":
        raise PermissionError("log in first")
    return Run()
"""


@functools.cache
def audit(seed: int = 0) -> tuple[SummaryBuilder, AuditSummary]:
    rows = random_rows(np.random.default_rng(seed), 40)
    rows[0] |= {"response_mask": [True], "log_ratio": [0.1], "kl": [math.inf], "kl_reverse": [0.1], "tv": [0.1]}
    builder = SummaryBuilder(Thresholds(delta_max=0.05), ["seq_max_kl <= 0.05"])
    builder.add(score_batch(rows))
    return builder, builder.finish(runs=[run_with_floor()])


def comparison() -> Comparison:
    (a, of_a), (b, of_b) = audit(0), audit(1)
    return compare(a, b, of_a, of_b, "before/", "after/")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path in which both trackers are modules that write down how they are called."""
    for kind in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, kind, None)  # so that the end of the test brings back what was there
        monkeypatch.delitem(sys.modules, kind)
        (tmp_path / f"{kind}.py").write_text(STAND_IN, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def calls(folder: Path) -> list[tuple[str, Any]]:
    return [tuple(json.loads(line)) for line in (folder / "calls.jsonl").read_text("utf-8").splitlines()]


def look_up(report: Any, path: str) -> Any:
    for part in path.split("/"):
        report = report[part]
    return {"inf": math.inf, "-inf": -math.inf}.get(report, report) if isinstance(report, str) else report


def test_figures_are_the_numbers_of_the_json_report_by_their_path() -> None:
    summary = audit()[1]
    report = summary.to_dict()
    found = figures(report)
    assert found["metrics/mean_k3/value"] == summary.metrics["mean_k3"].value
    assert found["sequences/seq_max_k2/p99"] == summary.sequences["seq_max_k2"].p99
    assert found["d_max/seq_max_kl"] == math.inf
    assert found["counts/n_total"] == 40
    assert found["violations/sequences/share"] == summary.violations.sequences.share  # type: ignore[union-attr]
    for path, value in found.items():
        assert type(value) in (int, float)
        assert not math.isnan(value)
        assert look_up(report, path) == value


def test_figures_leave_out_what_is_not_known_lists_words_and_settings() -> None:
    report = {
        "kind": "report",
        "schema_version": 3,
        "verdict": "inf",
        "run": {"noise_floor": {"num_tokens": 5}},
        "thresholds": {"delta_max": 0.05},
        "acceptance": None,
        "curve": [0.1, 0.2],
        "low": "-inf",
        "vacuous": True,
        "reasons": {"a/b\x1b\u202e": 3},
    }
    report["verdict"] = "a sentence"
    assert figures(report) == {"low": -math.inf, "reasons/a_b<U+001B><U+202E>": 3}
    assert settings(report) == {"kind": "report", "run": report["run"], "thresholds": report["thresholds"]}


def test_a_comparison_is_logged_with_both_reports() -> None:
    found = comparison()
    logged = figures(found.to_dict())
    assert logged["differences/mean_k3/difference"] == found.differences["mean_k3"].difference
    assert logged["differences/mean_k3/low"] == found.differences["mean_k3"].low
    assert "differences/seq_max_k2_p99/low" not in logged
    for side, summary in (("a", found.a), ("b", found.b)):
        own = figures(summary.to_dict())
        assert {path: value for path, value in logged.items() if path.startswith(f"{side}/")} == {
            f"{side}/{path}": value for path, value in own.items()
        }
    config = settings(found.to_dict())
    assert (config["name_a"], config["name_b"], config["kind"]) == ("before/", "after/", "comparison")
    assert config["a"] == settings(found.a.to_dict())


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_one_run_is_begun_logged_and_ended_and_stdout_stays_clean(
    kind: str, stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = audit()[1]
    log_to(kind, "project", summary, name="scores")
    begun, logged, ended = calls(stand_in)
    config = json.loads(json.dumps(settings(summary.to_dict())))
    assert begun == ("init", {"project": "project", "name": "scores", "config": config})
    assert config["run"]["dtype"] == "bfloat16"
    assert config["criteria"] == ["seq_max_kl <= 0.05"]
    assert logged == ("log", figures(summary.to_dict()))
    assert ended == ("finish", None)
    out, err = capsys.readouterr()
    assert out == ""
    assert "hello from the tracker" in err


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_tracker_that_refuses_is_an_error_with_a_next_step(kind: str, stand_in: Path) -> None:
    with pytest.raises(OutputError, match=f"(?s)--{kind}: {kind} did not take the figures.*log in first.*leave out"):
        log_to(kind, "forbidden", audit()[1])
    assert [name for name, _ in calls(stand_in)] == ["init"]


def test_a_run_is_ended_even_if_logging_fails(stand_in: Path) -> None:
    class Broken:
        def to_dict(self) -> dict[str, Any]:
            return {"broken": 1.0}

    with pytest.raises(OutputError, match="RuntimeError: no network"):
        log_to("wandb", "project", Broken())  # type: ignore[arg-type]
    assert [name for name, _ in calls(stand_in)] == ["init", "log", "finish"]


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_with_how_to_install_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(UsageError, match=f"(?s)--{kind}: the package {kind} is not installed.*pip install {kind}"):
        log_to(kind, "project", audit()[1])


def test_a_tracker_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UsageError, match=r"(?s)there is no tracker 'os'.*wandb, trackio"):
        log_to("os", "project", audit()[1])


def wandb_records(file: Path) -> list[Any]:
    """The records of an offline run: a LevelDB log, blocks of 32 KiB of pieces (checksum, length, kind, bytes)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, out = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record = data[at + 7 : at + 7 + length] if kind in (1, 2) else record + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(data):
            out.append(Record.FromString(record))
    return out


def written(file: Path) -> list[Any]:
    """The records of a run that has ended; another process of wandb may still be writing them."""
    for _ in range(300):
        records = wandb_records(file)
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise TimeoutError(file)


def test_wandb_has_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    # GIVEN a run that is open already
    own = wandb.init(project="training")
    # WHEN the report is logged
    summary = audit()[1]
    log_to("wandb", "audits", summary, name="scores")
    # THEN that run is still open, and there is a second one with the report's numbers
    own.log({"loss": 1.0})
    own.finish()
    runs = {}
    for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb"):
        records = written(file)
        (run,) = [record.run for record in records if record.HasField("run")]
        runs[run.project] = run, [record.history for record in records if record.HasField("history")]
    run, history = runs["audits"]
    assert run.display_name == "scores"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["criteria"] == ["seq_max_kl <= 0.05"]
    (step,) = history
    logged = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in step.item}
    logged = {path: value for path, value in logged.items() if not path.startswith("_")}
    assert logged == pytest.approx(figures(summary.to_dict()), rel=1e-12)
    assert [json.loads(item.value_json) for item in runs["training"][1][0].item if "loss" in item.nested_key] == [1.0]


def test_trackio_has_what_was_logged_and_stdout_stays_clean_to_the_end(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    code = """
import test_report_tracking as tests
tests.log_to("trackio", "audits", tests.audit()[1], name="scores")
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert ended.stdout == ""
    with sqlite3.connect(tmp_path / "audits.db") as database:
        ((name, text),) = database.execute("select run_name, metrics from metrics").fetchall()
    logged = {path: math.inf if value == "Infinity" else value for path, value in json.loads(text).items()}
    assert name == "scores"
    assert logged == pytest.approx(figures(audit()[1].to_dict()), rel=1e-12)
