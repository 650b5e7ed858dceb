"""What sample_data/README.md claims of the committed data, measured again without the package's own scoring."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent / "sample_data"
MEGABYTE = 1_000_000
KILOBYTE = 1_000


def load(name: str) -> ModuleType:
    """A module of sample_data/making, which is no installed package."""
    spec = importlib.util.spec_from_file_location(f"sample_data_{name}", ROOT / "making" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


measure, task = load("measure"), load("digit_sums")
TINY = ["tiny", "tiny-moe"]


@pytest.fixture(scope="module", params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = measure.rollout_rows(ROOT / name / "rollouts")
    return found


@pytest.fixture(scope="module")
def logits(name: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = measure.stored_logits(ROOT / name / "rollouts")
    return found


@pytest.fixture(scope="module")
def drift(name: str) -> list[dict[str, float]]:
    found: list[dict[str, float]] = measure.drift_table(ROOT / name)
    return found


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def test_the_folder_stays_small() -> None:
    assert size(ROOT) < 10 * MEGABYTE
    assert size(ROOT / "smollm2") < MEGABYTE
    for folder in TINY:
        assert (ROOT / folder / "model" / "model.safetensors").stat().st_size < 1.5 * MEGABYTE
    assert max(file.stat().st_size for file in (ROOT / "bad").glob("*.parquet")) < 10 * KILOBYTE


def test_divergence_rises_with_staleness(drift: list[dict[str, float]]) -> None:
    # GIVEN the versions, oldest first, WHEN the mean KL of their tokens is taken
    mean_kl = [row["mean_kl"] for row in drift]
    # THEN each younger one of at least four is closer to the trainer, and precision alone is far below drift
    assert len(drift) >= 4
    assert drift[-1]["staleness"] == 0
    assert mean_kl == sorted(mean_kl, reverse=True)
    assert mean_kl[-2] > 5 * mean_kl[-1] > 0


def test_a_threshold_of_0_05_keeps_some_and_rejects_some(drift: list[dict[str, float]]) -> None:
    kept = sum(row["kept_at_0.05"] * row["rollouts"] for row in drift) / sum(row["rollouts"] for row in drift)
    assert 0.4 < kept < 0.9


def test_routing_flips_are_impulses_of_kl() -> None:
    # GIVEN the newest version of the mixture of experts, where only precision differs
    flipped, flipped_so_far, kl = measure.routing_flips(ROOT / "tiny-moe")
    # WHEN tokens are told apart by whether the sampler, in bfloat16, routed them to other experts
    # THEN flips are rare, far above the rest, and what is largest comes with or after one
    assert (flipped.sum(), len(flipped)) == (21, 1009)
    assert kl[flipped].mean() > 10 * kl[~flipped].mean()
    assert kl[flipped_so_far].max() > 3 * kl[~flipped_so_far].max()


def test_routing_is_stored_of_every_token_but_the_last(name: str, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if name == "tiny":
            assert "routed_experts" not in row
        else:
            experts = np.array(row["routed_experts"])
            assert experts.shape == (len(row["prompt_ids"]) + len(row["response_ids"]) - 1, 3, 2)
            assert (experts[..., 0] != experts[..., 1]).all()
            assert 0 <= experts.min() <= experts.max() < 8


def test_precision_alone_gives_impulses_to_the_mixture_of_experts_only(
    name: str, drift: list[dict[str, float]]
) -> None:
    newest = drift[-1]
    assert (newest["impulses"] >= 3) == (name == "tiny-moe")
    assert (newest["max_kl"] > 0.01) == (name == "tiny-moe")


def test_an_impulse_stands_out_of_its_neighbours() -> None:
    # GIVEN a flat sequence with one peak, and one that is flat throughout
    kl = np.full(9, 1e-3)
    flat = measure.impulses(kl)
    kl[4] = 0.02
    # THEN only the peak counts
    assert (flat, measure.impulses(kl)) == (0, 1)


def test_stored_logprobs_agree_with_stored_logits(rows: list[dict[str, Any]], logits: dict[str, np.ndarray]) -> None:
    for row in rows:
        expected = measure.log_softmax(logits[row["rollout_id"]])[range(len(row["response_ids"])), row["response_ids"]]
        own = np.array(row["response_mask"])
        np.testing.assert_allclose(np.array(row["rollout_logprobs"])[own], expected[own], rtol=1e-5, atol=1e-5)


def test_logits_cover_every_response_position(rows: list[dict[str, Any]], logits: dict[str, np.ndarray]) -> None:
    shapes = {row["rollout_id"]: (len(row["response_ids"]), task.VOCAB_SIZE) for row in rows}
    assert {name: values.shape for name, values in logits.items()} == shapes


def test_rows_are_what_the_schema_says(name: str, rows: list[dict[str, Any]]) -> None:
    assert len({row["rollout_id"] for row in rows}) == len(rows)
    for row in rows:
        assert len(row["prompt_ids"]) > 0
        assert {len(row[column]) for column in ("response_mask", "rollout_logprobs")} == {len(row["response_ids"])}
        assert 0 <= min(row["response_ids"]) <= max(row["response_ids"]) < task.VOCAB_SIZE
        assert (row["finish_reason"] == "stop") == (row["response_ids"][-1] == task.EOS)
    for path in (ROOT / name / "rollouts").glob("rollouts-*.parquet"):
        assert pq.read_schema(path).metadata[b"trm_audit.kind"] == b"rollouts"


def test_rewards_can_be_checked_from_the_tokens(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["reward"] == task.reward(task.decode(row["prompt_ids"]), row["response_ids"])
    assert 0.2 < np.mean([row["reward"] for row in rows]) < 1


def test_the_calculators_tokens_are_masked_and_nothing_else(rows: list[dict[str, Any]]) -> None:
    # GIVEN every rollout, WHEN the calculator is played again along its tokens
    masked = 0
    for row in rows:
        due: list[int] = []
        for position, (token, own) in enumerate(zip(row["response_ids"], row["response_mask"], strict=True)):
            assert own == (not due)
            if due:
                assert token == due.pop(0)
                masked += 1
            else:
                due = task.observation(row["response_ids"][: position + 1])
    # THEN response_mask is false exactly where its answers stand, and such rows exist
    assert masked > 20


def test_the_tokenizer_reads_what_the_rollouts_say(name: str, rows: list[dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / name / "model")
    for row in rows[::17]:
        assert tokenizer.decode(row["response_ids"], skip_special_tokens=True) == row["response_text"]
        assert tokenizer.encode(task.decode(row["prompt_ids"])) == row["prompt_ids"]


@pytest.mark.parametrize("grade", ["top20", "full"])
def test_the_reference_has_the_rows_of_its_rollouts(grade: str) -> None:
    rollouts = pq.read_table(ROOT / "smollm2" / grade / "rollouts.parquet").to_pylist()
    reference = pq.read_table(ROOT / "smollm2" / grade / "reference.parquet").to_pylist()
    assert [row["rollout_id"] for row in reference] == [row["rollout_id"] for row in rollouts]
    for row, known in zip(rollouts, reference, strict=True):
        log_ratio = np.array(known["trainer_logprobs"]) - np.array(row["rollout_logprobs"], dtype=np.float64)
        np.testing.assert_allclose(known["log_ratio"], log_ratio, atol=1e-6)
        assert known["seq_max_kl"] == max(known["kl"])


def test_groups_of_the_real_slice_are_whole() -> None:
    groups = pq.read_table(ROOT / "smollm2" / "top20" / "rollouts.parquet")["group_id"].to_pylist()
    assert {groups.count(group) for group in groups} == {4}


CASES = json.loads((ROOT / "bad" / "cases.json").read_text())


def test_every_bad_case_exists_and_is_listed() -> None:
    listed = (ROOT / "bad" / "README.md").read_text()
    for case in CASES:
        assert (ROOT / "bad" / case["path"]).exists()
        assert f"| `{case['path']}`" in listed
    known = {ROOT / "bad" / case["path"] for case in CASES} | {ROOT / "bad" / "README.md", ROOT / "bad" / "cases.json"}
    assert {path for path in (ROOT / "bad").iterdir() if path.name != "models"} <= known


def test_every_rule_of_the_schema_has_a_bad_case() -> None:
    assert {case["rule"] for case in CASES} >= set(range(1, 13))


@pytest.mark.parametrize("damaged", ["flipped-byte.parquet", "truncated.parquet", "not-parquet.parquet"])
def test_damaged_files_cannot_be_read(damaged: str) -> None:
    with pytest.raises((OSError, ValueError)):
        pq.read_table(ROOT / "bad" / damaged, page_checksum_verification=True)


def test_the_flipped_byte_is_invisible_without_checksums() -> None:
    assert pq.read_table(ROOT / "bad" / "flipped-byte.parquet").num_rows == 3
