"""Whole scores of groups and of agents' turns: each rung and kernel, with and without read-ahead, against a loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCAB, logits_alone, save, tiny_model
from some_rollouts import as_table
from transformers import PreTrainedModel

from trm_audit.engine import tree
from trm_audit.engine.checkpoint import find_checkpoint
from trm_audit.engine.model import TrainerModel
from trm_audit.engine.noise import noise_floor
from trm_audit.engine.scorer import Scorer
from trm_audit.numerics.rows import torch_only
from trm_audit.rollout import RolloutBatch, TokenScores
from trm_audit.shards.logits import StoredLogits
from trm_audit.shards.rollout_writer import LogitsTableWriter
from trm_audit.shards.rows import RowRules, read_rows

Row = dict[str, Any]
RUNGS = ("tree", "fork", "packed", "padded", "alone")


@pytest.fixture(scope="module")
def trainer() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def model(trainer: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> TrainerModel:
    return TrainerModel(find_checkpoint(save(trainer, tmp_path_factory.mktemp("trainer"))), device="cpu")


def rollouts() -> list[Row]:
    """Two groups of one prompt each, interleaved; turns of an agent, whose prompts hold all before; tool tokens."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, 45).tolist(), rng.integers(0, VOCAB, 30).tolist()]
    rows = [(prompts[i % 2], rng.integers(0, VOCAB, 5 + 4 * i).tolist()) for i in range(6)]
    dialogue = prompts[0] + rng.integers(0, VOCAB, 90).tolist()
    rows += [(dialogue[:at], dialogue[at : at + 20]) for at in (60, 85, 110)]
    rows += [(prompts[0], rows[0][1]), (prompts[1], [])]  # the same once more, and nothing sampled
    return [
        {
            "rollout_id": f"r{i}",
            "prompt_ids": prompt,
            "response_ids": response,
            "response_mask": [i % 3 > 0 or not 2 <= t < 5 for t in range(len(response))],
            "rollout_logprobs": [-1.0] * len(response),
            "logits": rng.normal(0, 2, (len(response), VOCAB)).astype(np.float16),
        }
        for i, (prompt, response) in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredLogits:
    file = tmp_path_factory.mktemp("stored") / "logits-0.parquet"
    with LogitsTableWriter(file, "float16") as writer:
        for row in rollouts():
            if len(row["logits"]):
                writer.add(row["rollout_id"], row["logits"])
    return StoredLogits([file])


def batch_of(rows: list[Row], logits: StoredLogits | None) -> RolloutBatch:
    table = as_table([{name: row[name] for name in row if name != "logits"} for row in rows])
    rules = RowRules(vocab_size=VOCAB, logits=logits)
    batch, errors = read_rows(table.combine_chunks().to_batches()[0], "memory", np.arange(len(rows)), rules)
    assert errors == []
    return batch


@pytest.fixture(scope="module")
def expected(trainer: PreTrainedModel) -> dict[str, np.ndarray]:
    """One sequence, one token at a time, in float64 after the model's float32 forward."""
    out: dict[str, list[float]] = {"kl": [], "tv": [], "trainer_logprobs": [], "rollout_entropy": []}
    for row in rollouts():
        ids = row["prompt_ids"] + row["response_ids"]
        logits = logits_alone(trainer, torch.tensor(ids)).double().log_softmax(1).numpy()
        for t, (token, mine) in enumerate(zip(row["response_ids"], row["response_mask"], strict=True)):
            log_q = logits[len(row["prompt_ids"]) + t - 1]
            log_p = torch.from_numpy(row["logits"][t]).double().log_softmax(0).numpy()
            p, q = np.exp(log_p), np.exp(log_q)
            values = (p @ (log_p - log_q), abs(p - q).sum() / 2, log_q[token], -p @ log_p)
            for name, value in zip(out, values, strict=True):
                out[name].append(value if mine else np.nan)
    return {name: np.array(values) for name, values in out.items()}


def check(scores: TokenScores, expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(scores.tokens[name], values, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("max_tokens", [23, 64, 4096])
@pytest.mark.parametrize("rung", RUNGS)
def test_scores_are_those_of_single_sequences_on_every_rung(
    rung: str, max_tokens: int, model: TrainerModel, stored: StoredLogits, expected: dict[str, np.ndarray]
) -> None:
    before = model.sharing
    model.sharing = replace(before, rung=rung)
    try:
        scorer = Scorer(model, stored, head_rows=7, max_tokens=max_tokens)
        check(scorer.score(batch_of(rollouts(), stored)), expected)
    finally:
        model.sharing = before


def test_scores_do_not_depend_on_what_is_compiled_or_read_ahead(
    model: TrainerModel, stored: StoredLogits, expected: dict[str, np.ndarray]
) -> None:
    batch = batch_of(rollouts(), stored)
    ahead = Scorer(model, stored, head_rows=16).score(batch)
    behind = Scorer(model, stored, head_rows=16, read_ahead=False).score(batch)
    for name, values in ahead.tokens.items():
        np.testing.assert_array_equal(values, behind.tokens[name])
    with torch_only():
        check(Scorer(model, stored, head_rows=16).score(batch), expected)


def test_a_shared_prefix_goes_through_the_model_once(model: TrainerModel) -> None:
    rows = [np.array(row["prompt_ids"] + row["response_ids"]) for row in rollouts()]
    computed = {
        rung: sum(s.stop - s.start for step in model.steps(rows, rung=rung) for s in step.segments) for rung in RUNGS
    }
    prefixes = {tuple(row[: i + 1].tolist()) for row in rows for i in range(len(row))}
    assert computed["packed"] == computed["padded"] == computed["alone"] == sum(map(len, rows))
    assert len(prefixes) <= computed["tree"] < len(prefixes) + 100  # runs too short to be worth it are repeated
    assert computed["fork"] == computed["tree"] < computed["packed"] / 2


@pytest.fixture(scope="module")
def narrow(trainer: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainerModel]:
    """The trainer with bfloat16 weights, run in bfloat16 and in float32."""
    rounded = tiny_model("llama")
    for weight in rounded.parameters():
        weight.data = weight.data.bfloat16().float()
    checkpoint = find_checkpoint(save(rounded, tmp_path_factory.mktemp("narrow")))
    return {dtype: TrainerModel(checkpoint, device="cpu", dtype=dtype) for dtype in ("bfloat16", "float32")}


def test_the_noise_floor_is_what_two_runs_would_differ_by(narrow: dict[str, TrainerModel]) -> None:
    # GIVEN scores of the same rollouts in bfloat16 and in float32
    batch = batch_of(rollouts(), None)
    low, high = (Scorer(narrow[name], None, head_rows=16).score(batch) for name in ("bfloat16", "float32"))
    delta = np.abs(low.tokens["trainer_logprobs"] - high.tokens["trainer_logprobs"])[batch.response_mask]
    # WHEN the noise of the former is measured
    found = noise_floor(narrow["bfloat16"], [batch], head_rows=16)
    # THEN it is their difference, and divergences fit it
    assert found is not None
    assert (found.num_rollouts, found.num_tokens) == (10, batch.response_mask.sum())
    seen = found.float32.abs_delta_logprob
    assert seen.max > 1e-3
    np.testing.assert_allclose(
        [seen.mean, seen.p99, seen.max], [delta.mean(), np.quantile(delta, 0.99), delta.max()], rtol=0.02
    )
    assert 0 < found.float32.kl.mean <= found.float32.kl.p99 <= found.float32.kl.max < seen.max
    assert found.composition is not None
    assert 0 < found.composition.kl.max < 0.1


def test_float32_has_next_to_no_noise_and_nothing_has_none(narrow: dict[str, TrainerModel]) -> None:
    found = noise_floor(narrow["float32"], [batch_of(rollouts(), None)], head_rows=16)
    assert found is not None
    assert found.composition is not None
    assert found.composition.kl.max < 1e-9
    assert found.float32.kl.max < 1e-9
    assert noise_floor(narrow["bfloat16"], [], head_rows=16) is None


def test_padded_scores_in_bfloat16_do_not_depend_to_the_bit_on_the_batch(
    narrow: dict[str, TrainerModel], stored: StoredLogits
) -> None:
    # GIVEN constant shapes
    model, rows = narrow["bfloat16"], rollouts()
    before = model.sharing
    model.sharing = replace(before, rung="padded")
    try:
        scorer = Scorer(model, stored, head_rows=16, max_tokens=256)
        together = scorer.score(batch_of(rows, stored))
        # THEN a row alone, and all rows in another order, get the same bits
        backwards = scorer.score(batch_of(rows[::-1], stored))
        at = len(together.tokens["kl"])
        offset = 0
        for row in rows:
            n = len(row["response_ids"])
            alone = scorer.score(batch_of([row], stored))
            at -= n
            for name in ("trainer_logprobs", "kl", "tv", "trainer_entropy"):
                np.testing.assert_array_equal(alone.tokens[name], together.tokens[name][offset : offset + n])
                np.testing.assert_array_equal(alone.tokens[name], backwards.tokens[name][at : at + n])
            offset += n
    finally:
        model.sharing = before


def test_a_compiled_model_scores_the_same(
    trainer: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # GIVEN layers that are traced as for compiling, without the minute that generating code would take
    monkeypatch.setattr("trm_audit.engine.model.COMPILER", "eager")
    rows = [np.array(row["prompt_ids"] + row["response_ids"]) for row in rollouts()]
    checkpoint = find_checkpoint(save(trainer, tmp_path))
    plain = TrainerModel(checkpoint, device="cpu", sharing="tree")
    steps = plain.steps(rows, max_tokens=100)
    wanted = list(plain.hidden(steps, rows))
    try:
        compiled = TrainerModel(checkpoint, device="cpu", compile=True, sharing="tree")
        found = list(compiled.hidden(steps, rows))
    finally:
        tree.register()
    assert len(steps) > 2
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
