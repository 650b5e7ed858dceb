"""The lines of docs/export_snippets.md, run as they stand on batches laid out as verl and SkyRL lay theirs out."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Run
from torch import Tensor
from trainer_dumps import Rollout, mask_of, real_rollouts, with_a_tool

DOC = Path(__file__).resolve().parent.parent / "docs" / "export_snippets.md"
PAD = 2


def snippet(section: str) -> Any:
    """`export_rollouts` of a section, as a reader would paste it."""
    text = DOC.read_text(encoding="utf-8").split(f"\n## {section}\n")[1]
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    return names["export_rollouts"]


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    rows = real_rollouts()
    return [with_a_tool(rows[0]), *rows[1:8]]


def left(values: list[Any], width: int, filler: float) -> list[Any]:
    return [filler] * (width - len(values)) + values


def right(values: list[Any], width: int, filler: float) -> list[Any]:
    return values + [filler] * (width - len(values))


def tensor(rows: list[list[Any]]) -> Tensor:
    return torch.tensor(rows)


def verl_batch(rows: list[Rollout], bypass: bool = False) -> SimpleNamespace:
    """The fields that verl/experimental/agent_loop/agent_loop.py documents: prompts left, responses right padded."""
    p = max(len(row["prompt_ids"]) for row in rows) + 2
    r = max(len(row["response_ids"]) for row in rows) + 2
    sampler = tensor([right(row["rollout_logprobs"], r, 0.0) for row in rows])
    trainer = tensor([right(row["trainer_logprobs"], r, 0.0) for row in rows])
    reward = torch.zeros(len(rows), r)
    for i, row in enumerate(rows):
        reward[i, len(row["response_ids"]) - 1] = row["reward"]
    batch = {
        "prompts": tensor([left(row["prompt_ids"], p, PAD) for row in rows]),
        "responses": tensor([right(row["response_ids"], r, PAD) for row in rows]),
        "attention_mask": tensor(
            [left([1] * len(x["prompt_ids"]), p, 0) + right([1] * len(x["response_ids"]), r, 0) for x in rows]
        ),
        "response_mask": tensor([right(mask_of(row), r, 0) for row in rows]),
        "rollout_log_probs": sampler,
        "old_log_probs": sampler.clone() if bypass else trainer,
        "token_level_scores": reward,
    }
    return SimpleNamespace(batch=batch, non_tensor_batch={"uid": np.array([row["group_id"] for row in rows])})


class TrainingInputBatch(dict[str, Tensor]):
    """SkyRL's batch as far as it is a dict of tensors with metadata (skyrl/backends/skyrl_train/training_batch.py)."""

    metadata: dict[str, Any]


def skyrl_batch(rows: list[Rollout], pad: int) -> TrainingInputBatch:
    """`convert_prompts_responses_to_batch_tensors` of skyrl/train/dataset/preprocess.py, then `pad_batch`."""
    r = max(len(row["response_ids"]) for row in rows)
    total = max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)
    ids = [row["prompt_ids"] + row["response_ids"] for row in rows]
    fields = {
        "sequences": [left(row, total, PAD) for row in ids],
        "attention_mask": [left([1] * len(row), total, 0) for row in ids],
        "response_mask": [left([1] * len(row["response_ids"]), r, 0) for row in rows],
        "loss_mask": [left([float(m) for m in mask_of(row)], r, 0.0) for row in rows],
        "rewards": [left([0.0] * (len(row["response_ids"]) - 1) + [row["reward"]], r, 0.0) for row in rows],
        "rollout_logprobs": [left(row["rollout_logprobs"], r, 0.0) for row in rows],
        "action_log_probs": [left(row["trainer_logprobs"], r, 0.0) for row in rows],
    }
    batch = TrainingInputBatch({name: tensor([*value, *value[:pad]]) for name, value in fields.items()})
    batch["loss_mask"][len(rows) :] = 0
    batch.metadata = {"uids": [row["group_id"] for row in rows] + [f"pad{i}" for i in range(pad)], "pad_size": pad}
    return batch


def check(path: Path, rollouts: list[Rollout], run: Run) -> None:
    found = pq.read_table(path).to_pylist()
    assert len(found) == len(rollouts)
    for row, truth in zip(found, rollouts, strict=True):
        assert row["prompt_ids"] == truth["prompt_ids"]
        assert row["response_ids"] == truth["response_ids"]
        assert row["response_mask"] == [bool(value) for value in mask_of(truth)]
        assert np.array_equal(np.float32(row["rollout_logprobs"]), np.float32(truth["rollout_logprobs"]))
        assert np.array_equal(np.float32(row["trainer_logprobs"]), np.float32(truth["trainer_logprobs"]))
        assert row["reward"] == truth["reward"]
        assert row["group_id"] == f"step7/{truth['group_id']}"
    assert run("validate", path).code == 0
    outcome = run("score", path, "--trainer-logprobs", "stored", "-o", path.parent / "scores")
    assert outcome.code == 0, outcome.err


def test_the_lines_for_verl_write_what_was_sampled(rollouts: list[Rollout], tmp_path: Path, run: Run) -> None:
    path = tmp_path / "step7.parquet"
    snippet("verl")(verl_batch(rollouts), path, 7)
    check(path, rollouts, run)


def test_in_bypass_mode_verl_has_no_values_of_its_trainer(rollouts: list[Rollout], tmp_path: Path) -> None:
    path = tmp_path / "step7.parquet"
    snippet("verl")(verl_batch(rollouts, bypass=True), path, 7)
    assert "trainer_logprobs" not in pq.read_schema(path).names


def test_the_lines_for_skyrl_write_what_was_sampled(rollouts: list[Rollout], tmp_path: Path, run: Run) -> None:
    """GIVEN blocks padded on the left and three copies at the end, THEN the rows written are those of the rollouts."""
    path = tmp_path / "step7.parquet"
    snippet("SkyRL")(skyrl_batch(rollouts, pad=3), path, 7, logprobs_mode="raw")
    check(path, rollouts, run)
