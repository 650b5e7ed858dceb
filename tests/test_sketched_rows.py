"""Rows of grade sketch from the shard to the scores: rule 13, and the scorer against the definition in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from models import VOCAB, logits_alone, save, tiny_model
from transformers import PreTrainedModel

from trm_audit.engine.checkpoint import find_checkpoint
from trm_audit.engine.model import TrainerModel
from trm_audit.engine.scorer import Scorer
from trm_audit.errors import RowError, UsageError
from trm_audit.numerics.signs import signs
from trm_audit.record.evidence import Recipe, TokenEvidence, evidence
from trm_audit.rollout import RolloutBatch, Sampling, TokenScores
from trm_audit.shards.rows import RowRules, read_rows
from trm_audit.shards.scores import score_columns
from trm_audit.shards.sketches import sketch_columns

LENGTH, PROMPT = 11, [3, 8, 2]
SETTINGS = {"plain": Sampling(), "tempered": Sampling(0.7), "truncated": Sampling(0.8, 0.9, 40)}
RECIPES = {"plain": Recipe(4, 64, 1), "tempered": Recipe(8, 128, 7), "truncated": Recipe(4, 64, -3)}


def softmax(z: np.ndarray) -> np.ndarray:
    z = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
    return np.asarray(z / z.sum(-1, keepdims=True))


def sampling_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """pi_roll [n, V] by its definition: temperature, the k largest, then the smallest set that reaches top_p."""
    out = []
    for z in logits.astype(np.float64) / sampling.temperature:
        p = softmax(z)
        order = np.argsort(-p)
        if sampling.top_k > 0:
            p[order[sampling.top_k :]] = 0
            p /= p.sum()
        p[order[np.cumsum(p[order]) - p[order] >= sampling.top_p]] = 0
        out.append(p / p.sum())
    return np.stack(out)


@pytest.fixture(scope="module")
def trainer() -> PreTrainedModel:
    made = tiny_model("llama", seed=1)
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(3)
    return made


@pytest.fixture(scope="module")
def model(trainer: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> TrainerModel:
    return TrainerModel(find_checkpoint(save(trainer, tmp_path_factory.mktemp("trainer"))), device="cpu")


class Rollouts:
    """One rollout under each setting, of a policy near the trainer; tokens 3 and 4 of each are a tool's."""

    def __init__(self, trainer: PreTrainedModel) -> None:
        rng = np.random.default_rng(0)
        self.names, self.mask = list(SETTINGS), np.array([t not in (3, 4) for t in range(LENGTH)])
        self.ids, self.p, self.q, self.kept = [], [], [], []
        for name, sampling in SETTINGS.items():
            ids = rng.integers(0, VOCAB, LENGTH)
            raw = logits_alone(trainer, torch.tensor([*PROMPT, *ids])).numpy()[len(PROMPT) - 1 : -1]
            logits = (raw + rng.normal(scale=0.3, size=raw.shape)).astype(np.float32)
            p = sampling_distribution(logits, sampling)
            drawn = np.array([rng.choice(VOCAB, p=row) for row in p])  # as if the trainer had seen other tokens
            at = torch.from_numpy(logits[self.mask])
            self.kept.append(evidence(at, drawn[self.mask], sampling, RECIPES[name]))
            self.ids.append(drawn)
            self.p.append(p)
            raw = logits_alone(trainer, torch.tensor([*PROMPT, *drawn])).double().numpy()[len(PROMPT) - 1 : -1]
            self.q.append(softmax(raw / sampling.temperature))

    def batch(self, **changed: Sequence[Any]) -> pa.RecordBatch:
        columns: dict[str, Any] = {
            "rollout_id": self.names,
            "prompt_ids": pa.array([PROMPT] * 3, pa.list_(pa.int32())),
            "response_ids": pa.array([ids.tolist() for ids in self.ids], pa.list_(pa.int32())),
            "response_mask": [self.mask.tolist()] * 3,
            "temperature": [SETTINGS[name].temperature for name in self.names],
            "top_p": [SETTINGS[name].top_p for name in self.names],
            "top_k": [SETTINGS[name].top_k for name in self.names],
            "logprobs_mode": ["processed"] * 3,
            **sketch_columns([one.numpy() for one in self.kept], [self.mask] * 3),
        }
        return pa.RecordBatch.from_pydict(columns | changed)


@pytest.fixture(scope="module")
def rollouts(trainer: PreTrainedModel) -> Rollouts:
    return Rollouts(trainer)


def read(batch: pa.RecordBatch, vocab_size: int | None = VOCAB) -> tuple[RolloutBatch, list[RowError]]:
    return read_rows(batch, "memory", np.arange(batch.num_rows), RowRules(vocab_size=vocab_size))


@pytest.fixture(scope="module")
def scored(rollouts: Rollouts, model: TrainerModel) -> tuple[RolloutBatch, TokenScores]:
    batch, errors = read(rollouts.batch())
    assert errors == []
    return batch, Scorer(model, None, head_rows=5, max_tokens=32).score(batch)


# --- what is stored


def test_what_a_recorder_keeps_is_of_the_policy_that_sampled(rollouts: Rollouts) -> None:
    for name, kept, p, ids in zip(rollouts.names, rollouts.kept, rollouts.p, rollouts.ids, strict=True):
        p, ids = p[rollouts.mask], ids[rollouts.mask]
        at = np.arange(len(ids))
        np.testing.assert_allclose(kept.logprobs.numpy(), np.log(p[at, ids]), atol=2e-6)
        listed = np.take_along_axis(p, kept.topk_ids.numpy(), 1)
        np.testing.assert_allclose(np.exp(kept.topk_logprobs.double().numpy()), listed, rtol=4e-3, atol=1e-12)
        np.testing.assert_array_equal(listed, -np.sort(-p, axis=1)[:, : RECIPES[name].k])
        rest = p.copy()
        np.put_along_axis(rest, kept.topk_ids.numpy(), 0, 1)
        np.testing.assert_allclose(kept.tail_mass.numpy(), rest.sum(1), rtol=1e-5)
        matrix = signs(VOCAB, RECIPES[name].dim, RECIPES[name].seed).double().numpy() / RECIPES[name].dim ** 0.5
        np.testing.assert_allclose(kept.vectors.double().numpy(), np.sqrt(rest) @ matrix, rtol=1e-3, atol=1e-4)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.where(p > 0, p * np.log(p), 0).sum(1)
        np.testing.assert_allclose(kept.entropy.numpy(), entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", ["tempered", "processed"])
def test_what_a_stage_has_behind_it_is_not_done_again(stage: str) -> None:
    rng = torch.Generator().manual_seed(0)
    raw, ids = 3 * torch.randn(5, 300, generator=rng), [0, 1, 2, 3, 4]
    whole = evidence(raw, ids, Sampling(0.5, 0.8, 40, "raw"))
    p = torch.from_numpy(sampling_distribution(raw.numpy(), Sampling(0.5, 0.8, 40)))
    at_stage = raw / 0.5 if stage == "tempered" else p.log()
    again = evidence(at_stage, whole.topk_ids[:, 0], Sampling(0.5, 0.8, 40, stage))
    torch.testing.assert_close(again.tail_mass, evidence(raw, again.token_ids, Sampling(0.5, 0.8, 40)).tail_mass)
    torch.testing.assert_close(again.logprobs, whole.topk_logprobs[:, 0].float(), atol=1e-3, rtol=1e-3)


def test_a_token_that_was_drawn_is_in_the_support_whatever_truncation_says() -> None:
    kept = evidence(torch.tensor([[0.0, -1.0, -9.0]]), [2], Sampling(top_k=2))
    assert kept.logprobs[0] == pytest.approx(-9 - math.log(1 + math.exp(-1) + math.exp(-9)), abs=1e-6)


def test_evidence_of_steps_joins_to_that_of_all_of_them() -> None:
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    whole = evidence(logits, range(6))
    parts = TokenEvidence.cat([evidence(logits[i : i + 1], [i]) for i in range(6)])
    for name, values in whole.rows([4, 1]).numpy().items():
        np.testing.assert_allclose(parts.rows(torch.tensor([4, 1])).numpy()[name], values, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="several recipes"):
        TokenEvidence.cat([whole, evidence(logits, range(6), recipe=Recipe(seed=2))])


def test_autocast_around_the_engine_changes_nothing() -> None:
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = TokenEvidence.cat([evidence(logits, range(6), Sampling(0.7, 0.9))] * 2)
    outside = TokenEvidence.cat([evidence(logits, range(6), Sampling(0.7, 0.9))] * 2)
    for name, values in outside.numpy().items():
        np.testing.assert_array_equal(inside.numpy()[name], values)


def test_a_mask_of_large_negative_logits_is_a_probability_of_0() -> None:
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    logits[:, 10:] = -1e4
    assert (evidence(logits, [1, 2]).topk_logprobs > -torch.inf).sum(1).tolist() == [10, 10]


def test_what_cannot_be_recorded_is_refused() -> None:
    for values in ({"k": 0}, {"dim": 63}, {"seed": 2**63}):
        with pytest.raises(UsageError, match="no recipe"):
            Recipe(**values)
    for strange in ("abc", 1.5, True):
        with pytest.raises(UsageError, match="seed of a recipe is a whole number"):
            Recipe(seed=strange)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="and a vocabulary of 5"):
        evidence(torch.zeros(1, 5), [5])
    with pytest.raises(UsageError, match="Greedy"):
        evidence(torch.zeros(1, 5), [0], Sampling(0.0))
    with pytest.raises(ValueError, match="3 tokens"):
        evidence(torch.zeros(2, 5), [0, 1, 2])


# --- the scorer


def test_the_estimate_is_the_chain_rule_with_twice_the_projected_distance(
    rollouts: Rollouts, scored: tuple[RolloutBatch, TokenScores]
) -> None:
    batch, scores = scored
    for row, (name, kept) in enumerate(zip(rollouts.names, rollouts.kept, strict=True)):
        found = scores.tokens["kl_estimate"][batch.response.offsets[row] : batch.response.offsets[row + 1]]
        hellinger = scores.tokens["hellinger2"][batch.response.offsets[row] : batch.response.offsets[row + 1]]
        recipe, q = RECIPES[name], rollouts.q[row]
        matrix = signs(VOCAB, recipe.dim, recipe.seed).double().numpy() / recipe.dim**0.5
        for i, t in enumerate(np.flatnonzero(rollouts.mask)):
            there = kept.topk_logprobs[i] > -torch.inf
            ids, p = kept.topk_ids[i][there].numpy(), kept.topk_logprobs[i][there].double().exp().numpy()
            tail = q[t].copy()
            tail[ids] = 0
            r, s = float(kept.tail_mass[i]), tail.sum()
            a, b = kept.vectors[i].double().numpy(), np.sqrt(tail) @ matrix
            wanted = (p * np.log(p / q[t][ids]) + q[t][ids] - p).sum() + (r * math.log(r / s) if r else 0.0) + s - r
            if r:
                wanted += 2 * r * np.square(a / math.sqrt(r) - b / math.sqrt(s)).sum()
            assert found[t] == pytest.approx(wanted, rel=1e-3, abs=2e-5)
            distance = np.square(np.sqrt(p) - np.sqrt(q[t][ids])).sum() + np.square(a - b).sum()
            assert hellinger[t] == pytest.approx(distance, rel=1e-3, abs=1e-5)


def test_exact_divergences_lie_within_the_bounds(rollouts: Rollouts, scored: tuple[RolloutBatch, TokenScores]) -> None:
    batch, scores = scored
    assert batch.grade == ["sketch"] * 3
    assert scores.audited_policy == ["sampling"] * 3
    assert scores.num_disagreements.tolist() == [0, 0, 0]
    for row, (p, q) in enumerate(zip(rollouts.p, rollouts.q, strict=True)):
        here = slice(batch.response.offsets[row], batch.response.offsets[row + 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            kl, tv = np.where(p > 0, p * np.log(p / q), 0).sum(1), np.abs(p - q).sum(1) / 2
        for name, exact in (("kl", kl), ("tv", tv)):
            lower, upper = (scores.tokens[f"{name}_{side}"][here] for side in ("lower", "upper"))
            assert (lower[rollouts.mask] <= exact[rollouts.mask]).all()
            assert (exact[rollouts.mask] <= upper[rollouts.mask]).all()
            assert np.isnan(lower[~rollouts.mask]).all()


def test_a_token_s_bounds_do_not_depend_on_who_is_scored_with_it(
    rollouts: Rollouts, scored: tuple[RolloutBatch, TokenScores], model: TrainerModel
) -> None:
    batch, scores = scored
    for row in range(3):
        alone, _ = read(rollouts.batch().slice(row, 1))
        again = Scorer(model, None, head_rows=10**4).score(alone)
        for name in ("kl_estimate", "kl_upper", "tv_upper", "rollout_entropy"):
            here = scores.tokens[name][batch.response.offsets[row] : batch.response.offsets[row + 1]]
            np.testing.assert_allclose(again.tokens[name], here, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_more_confidence_costs_wider_bounds_and_moves_no_estimate(
    rollouts: Rollouts, scored: tuple[RolloutBatch, TokenScores], model: TrainerModel
) -> None:
    batch, scores = scored
    surer = Scorer(model, None, head_rows=5, max_tokens=32, confidence=0.9999).score(batch)
    there = ~np.isnan(scores.tokens["kl_estimate"])
    assert (surer.tokens["kl_upper"] > scores.tokens["kl_upper"])[there].any()
    assert (surer.tokens["kl_upper"] >= scores.tokens["kl_upper"])[there].all()
    assert (surer.tokens["kl_lower"] <= scores.tokens["kl_lower"])[there].all()
    np.testing.assert_array_equal(surer.tokens["hellinger2"], scores.tokens["hellinger2"])


def test_score_shards_leave_the_sketch_behind_and_keep_the_entropy(
    rollouts: Rollouts, scored: tuple[RolloutBatch, TokenScores]
) -> None:
    columns = score_columns(*scored, None, rebuilds=False)
    assert not {"rollout_sketch", "rollout_tail_mass", "rollout_topk_ids"} & set(columns.schema.names)
    assert columns.column("sketch_seed").to_pylist() == [RECIPES[name].seed for name in rollouts.names]
    entropy = np.array(columns.column("rollout_entropy")[0].as_py(), dtype=float)[rollouts.mask]
    np.testing.assert_array_equal(entropy, rollouts.kept[0].entropy.double().numpy())
    assert np.isfinite(columns.column("seq_max_kl_estimate").to_numpy()).all()


# --- rule 13


FAULTS = {
    "no seed": ({"sketch_seed": pa.array([1, None, -3], pa.int64())}, "without sketch_seed"),
    "no vocabulary": ({"sketch_vocab_size": pa.array([VOCAB, None, VOCAB], pa.int32())}, "without sketch_vocab_size"),
    "another vocabulary": (
        {"sketch_vocab_size": pa.array([VOCAB, VOCAB + 1, VOCAB], pa.int32())},
        f"the sketch is of {VOCAB + 1} tokens, the model has {VOCAB}",
    ),
    "another dimension": ({"sketch_dim": pa.array([64, 64, 64], pa.int32())}, "1408 are needed"),
    "few dimensions": ({"sketch_dim": pa.array([64, 32, 64], pa.int32())}, "sketch_dim is 32, at least 64"),
    "no tail mass": (None, "without rollout_tail_mass"),
    "tail mass of 2": (2.0, "rollout_tail_mass at position 5 is no probability"),
    "tail mass of 1e-4": (1e-4, "rollout_sketch at position 5 does not have the length of its tail mass"),
    "tail mass of another position": (0.5, "do not make 1 together"),
    "tail mass of NaN": (math.nan, "rollout_tail_mass at position 5 is no probability"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_sketch_is_named_and_the_other_rows_stay(rollouts: Rollouts, fault: str) -> None:
    change, phrase = FAULTS[fault]
    batch = rollouts.batch()
    if not isinstance(change, dict):
        tails = batch.column("rollout_tail_mass").to_pylist()
        tails[1] = None if change is None else [change if t == 5 else value for t, value in enumerate(tails[1])]
        change = {"rollout_tail_mass": pa.array(tails, pa.list_(pa.float32()))}
    good, errors = read(rollouts.batch(**change))
    assert [error.place for error in errors] == ["memory, row 1 (rollout_id=tempered)"]
    assert phrase in errors[0].cause
    assert "rule 13" in errors[0].next_step or "--vocab-size" in errors[0].next_step
    assert good.rollout_id == ["plain", "truncated"]
    assert good.grade == ["sketch", "sketch"]


def test_what_stands_at_a_tool_s_tokens_is_not_looked_at(rollouts: Rollouts) -> None:
    tails = [
        [9.0 if t == 3 else value for t, value in enumerate(row)]
        for row in rollouts.batch()["rollout_tail_mass"].to_pylist()
    ]
    _, errors = read(rollouts.batch(rollout_tail_mass=pa.array(tails, pa.list_(pa.float32()))))
    assert errors == []


def test_a_row_without_its_sketch_is_of_the_grade_below(rollouts: Rollouts) -> None:
    vectors = rollouts.batch()["rollout_sketch"].to_pylist()
    batch, errors = read(rollouts.batch(rollout_sketch=pa.array([vectors[0], None, None], pa.large_binary())))
    assert errors == []
    assert batch.grade == ["sketch", "interval", "interval"]


def test_without_a_model_the_vocabulary_is_not_known_and_any_fits(rollouts: Rollouts) -> None:
    _, errors = read(rollouts.batch(sketch_vocab_size=pa.array([7 * VOCAB] * 3, pa.int32())), vocab_size=None)
    assert errors == []
