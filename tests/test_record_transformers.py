"""What the recorder keeps of `generate`, against float64 distributions of the logits of the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from models import VOCAB, save, tiny_model
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

import trm_audit
from trm_audit.errors import UsageError
from trm_audit.record.evidence import Recipe
from trm_audit.record.transformers import GenerateRecorder
from trm_audit.record.writer import RolloutWriter

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [21, 22, 23]]
PAD, EOS = 0, 2
K, M = 8, 64
HALF = 2.0**-11
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "defaults": {},  # top_k is 50
    "tempered": {"temperature": 0.7, "top_k": 0},
    "truncated": {"temperature": 1.3, "top_k": 12, "top_p": 0.8},
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def batch(prompts: list[list[int]] = PROMPTS) -> dict[str, torch.Tensor]:
    """Padded on the left, as a tokenizer does for generation."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, recorder: GenerateRecorder | None, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    given = {"do_sample": True, "max_new_tokens": 12, "pad_token_id": PAD, "eos_token_id": EOS, **settings}
    return model.generate(**{**batch(), **given}, custom_generate=recorder)


def read(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("rollouts-*.parquet")) for row in pq.read_table(file).to_pylist()]


def by_definition(logits: np.ndarray, temperature: float = 1.0, top_k: int = 50, top_p: float = 1.0) -> np.ndarray:
    """Probabilities that one row of raw logits gives, token by token, in float64."""
    scaled = [float(value) / temperature for value in logits]
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    kept = order[:top_k] if top_k else order
    weights = {token: np.exp(scaled[token] - scaled[order[0]]) for token in kept}
    total, before, nucleus = sum(weights.values()), 0.0, []
    for token in kept:
        if before < top_p:
            nucleus.append(token)
        before += weights[token] / total
    out = np.zeros(len(scaled))
    for token in nucleus:
        out[token] = weights[token]
    return out / out.sum()


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_evidence_is_of_the_distribution_that_was_sampled_from(
    model: PreTrainedModel, tmp_path: Path, settings: str
) -> None:
    # GIVEN raw logits of the same call
    with GenerateRecorder(tmp_path, Recipe(K, M)) as recorder:
        out = generate(model, recorder, output_logits=True, return_dict_in_generate=True, **SETTINGS[settings])
    raw = torch.stack(out.logits, dim=1).double().numpy()  # [rows, steps, V]
    rows = read(tmp_path)
    assert len(rows) == 3
    for i, row in enumerate(rows):
        assert len(row["response_ids"]) >= 1
        for t, token in enumerate(row["response_ids"]):
            p = by_definition(raw[i, t], **SETTINGS[settings])
            # THEN the sampled value, the list, the tail's mass and the entropy are those of the tempered and
            # truncated distribution
            assert row["rollout_logprobs"][t] == pytest.approx(np.log(p[token]), abs=1e-5)
            listed = row["rollout_topk_ids"][t]
            assert len(listed) == min(K, np.count_nonzero(p))
            assert sorted(p[listed]) == pytest.approx(sorted(p)[::-1][: len(listed)][::-1], rel=1e-5)
            values = np.array(row["rollout_topk_logprobs"][t])
            assert np.abs(values - np.log(p[listed])).max() <= HALF * np.abs(np.log(p[listed])).max() + 1e-5
            assert row["rollout_tail_mass"][t] == pytest.approx(1 - p[listed].sum(), abs=1e-6)
            assert row["rollout_entropy"][t] == pytest.approx(-sum(x * np.log(x) for x in p if x > 0), abs=1e-5)
        given = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, **SETTINGS[settings]}
        assert (row["temperature"], row["top_p"]) == (given["temperature"], given["top_p"])
        assert row["top_k"] == (given["top_k"] or -1)
        assert row["logprobs_mode"] == "processed"


def test_recording_changes_neither_the_tokens_nor_what_generate_returns(model: PreTrainedModel, tmp_path: Path) -> None:
    with GenerateRecorder(tmp_path) as recorder:
        with_it = generate(model, recorder, seed=3, temperature=0.8, output_scores=True, return_dict_in_generate=True)
    without = generate(model, None, seed=3, temperature=0.8, output_scores=True, return_dict_in_generate=True)
    assert type(with_it) is type(without)
    assert torch.equal(with_it.sequences, without.sequences)
    assert all(torch.equal(a, b) for a, b in zip(with_it.scores, without.scores, strict=True))


def test_padding_is_no_token_of_prompt_or_response_and_eos_is_one(model: PreTrainedModel, tmp_path: Path) -> None:
    # GIVEN several calls in which some rows end early: at one of two end-of-sequence tokens, one of which is padding
    with GenerateRecorder(tmp_path) as recorder:
        out = [generate(model, recorder, seed, max_new_tokens=30, eos_token_id=[PAD, 3, 40]) for seed in range(4)]
    rows = read(tmp_path)
    # THEN each row is what generate returned up to its end
    ends = set()
    for i, row in enumerate(rows):
        call, at = divmod(i, 3)
        response = out[call][at, 5:].tolist()
        stops = [t for t, token in enumerate(response) if token in (PAD, 3, 40)]
        length = stops[0] + 1 if stops else len(response)
        assert row["prompt_ids"] == PROMPTS[at]
        assert row["response_ids"] == response[:length]
        assert row["response_mask"] == [True] * length
        assert row["finish_reason"] == ("stop" if stops else "length")
        ends.add(length)
    assert len(ends) > 3
    found = trm_audit.validate([str(tmp_path)], trm_audit.ValidateOptions(vocab_size=VOCAB))
    assert found.errors == []
    assert found.grades["sketch"] == 12


def test_rows_of_a_prompt_share_a_group_and_take_their_rewards_in_order(model: PreTrainedModel, tmp_path: Path) -> None:
    with GenerateRecorder(tmp_path) as recorder:
        # GIVEN two calls, the first with two rows for each prompt
        out = generate(model, recorder, num_return_sequences=2)
        generate(model, recorder, seed=1)
        names = recorder.finish(rewards=torch.arange(9) / 4, policy_version=7, difficulty=[*"abcdefghi"])
        generate(model, recorder, seed=2)
        mine = recorder.finish(group_ids=["x", "x", "y"], rollout_ids=["p", "q", "r"])
        generate(model, recorder, seed=3)  # nobody finishes these
    rows = read(tmp_path)
    assert [row["prompt_ids"] for row in rows[:6]] == [PROMPTS[i] for i in (0, 0, 1, 1, 2, 2)]
    for i, row in enumerate(rows[:6]):
        assert row["response_ids"] == out[i, 5 : 5 + len(row["response_ids"])].tolist()
    groups = [row["group_id"] for row in rows]
    assert groups[0] == groups[1] != groups[2] == groups[3] != groups[4] == groups[5]
    assert groups[6:9] == [None] * 3
    assert [row["reward"] for row in rows] == [i / 4 for i in range(9)] + [None] * 6
    assert [row["policy_version"] for row in rows] == [7] * 9 + [None] * 6
    assert [row["difficulty"] for row in rows] == [*"abcdefghi"] + [None] * 6
    assert [row["rollout_id"] for row in rows[:9]] == names
    assert ([row["rollout_id"] for row in rows[9:12]], groups[9:12]) == (mine, ["x", "x", "y"])
    assert len({row["rollout_id"] for row in rows}) == 15


class Shift(LogitsProcessor):
    """Somebody's own processor, which changes the distribution."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.linspace(0, 3, scores.shape[1])


class AfterFour(StoppingCriteria):
    """Ends the second row after four tokens, without an end-of-sequence token."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[1] = input_ids.shape[1] >= 5 + 4
        return done


def test_whatever_else_shapes_the_scores_is_in_the_evidence_and_named(model: PreTrainedModel, tmp_path: Path) -> None:
    # GIVEN a processor of one's own, a repetition penalty and min-p
    with GenerateRecorder(tmp_path, Recipe(VOCAB, M)) as recorder:
        out = generate(
            model,
            recorder,
            output_scores=True,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([Shift()]),
            repetition_penalty=1.3,
            min_p=0.05,
            temperature=0.9,
            top_k=VOCAB - 1,
            top_p=0.99,
        )
    for i, row in enumerate(read(tmp_path)):
        for t, token in enumerate(row["response_ids"]):
            # THEN the recorded distribution is the softmax of the scores that generate itself reports
            p = torch.stack(out.scores, dim=1)[i, t].double().softmax(0)
            assert len(row["rollout_topk_ids"][t]) == int((p > 0).sum())
            assert row["rollout_logprobs"][t] == pytest.approx(float(p[token].log()), abs=1e-5)
        assert row["logits_processors"] == "RepetitionPenaltyLogitsProcessor, Shift, MinPLogitsWarper"


def test_a_row_that_another_criterion_ends_is_recorded_up_to_there(model: PreTrainedModel, tmp_path: Path) -> None:
    with GenerateRecorder(tmp_path) as recorder:
        out = generate(model, recorder, stopping_criteria=StoppingCriteriaList([AfterFour()]), eos_token_id=96)
    rows = read(tmp_path)
    assert [len(row["response_ids"]) for row in rows] == [12, 4, 12]
    assert rows[1]["response_ids"] == out[1, 5:9].tolist()
    assert [row["finish_reason"] for row in rows] == ["length", None, "length"]


def test_a_time_limit_is_no_stop_and_without_other_processors_none_is_named(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    with GenerateRecorder(tmp_path) as recorder:
        generate(model, recorder, max_time=1e-9, eos_token_id=96, temperature=0.7, top_k=9, top_p=0.9)
    for row in read(tmp_path):
        assert (len(row["response_ids"]), row["finish_reason"]) == (1, None)
        assert row.get("logits_processors") is None


def test_a_top_k_above_what_is_kept_is_said_once(
    model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for k in (20, 50):
        with GenerateRecorder(tmp_path, Recipe(k)) as recorder:
            for seed in range(2):
                generate(model, recorder, seed, max_new_tokens=1)
    said = [record.message for record in caplog.records if record.name.startswith("trm_audit")]
    assert said == [
        "top_k 50 is above the 20 tokens that are kept: estimates of KL come out too high; take Recipe(k=50)."
    ]


def test_work_is_done_in_pieces_without_changing_what_is_recorded(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for held in (1, 7 * 3 * VOCAB, 1 << 22):
        monkeypatch.setattr("trm_audit.record.transformers.HELD_LOGITS", held)
        with GenerateRecorder(tmp_path / str(held)) as recorder:
            generate(model, recorder, eos_token_id=[3, 40, 41, 42], max_new_tokens=20)
            recorder.finish(rollout_ids=["a", "b", "c"])
    step, some, whole = (read(tmp_path / str(held)) for held in (1, 7 * 3 * VOCAB, 1 << 22))
    for one, other in ((step, whole), (some, whole)):
        for a, b in zip(one, other, strict=True):
            assert a["response_ids"] == b["response_ids"]
            assert a["rollout_topk_ids"] == b["rollout_topk_ids"]
            assert np.allclose(a["rollout_logprobs"], b["rollout_logprobs"], atol=1e-6)
            x, y = (np.frombuffer(row["rollout_sketch"], "<f2").astype(float) for row in (a, b))
            assert np.allclose(x, y, atol=2e-3)


def test_a_writer_of_ones_own_stays_open(model: PreTrainedModel, tmp_path: Path) -> None:
    with RolloutWriter(tmp_path, engine="mine") as writer:
        with GenerateRecorder(writer) as recorder:
            generate(model, recorder)
        assert len(writer) == 3
        with GenerateRecorder(writer) as recorder:
            generate(model, recorder)
    assert [row["engine"] for row in read(tmp_path)] == ["mine"] * 6


def test_an_exception_in_generate_loses_that_call_and_nothing_before(model: PreTrainedModel, tmp_path: Path) -> None:
    class Dies(MaxLengthCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> Any:
            raise RuntimeError("out of memory")

    def work() -> None:
        with GenerateRecorder(tmp_path) as recorder:
            generate(model, recorder)
            generate(model, recorder, stopping_criteria=StoppingCriteriaList([Dies(99)]))

    with pytest.raises(RuntimeError, match="out of memory"):
        work()
    assert len(read(tmp_path)) == 3


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "greedy": ({"do_sample": False}, "greedy decoding has no distribution"),
    "beams": ({"num_beams": 2, "do_sample": False}, "generate is set to beam search"),
    "beam-sampling": ({"num_beams": 2}, "generate is set to beam sample"),
    "prompt-lookup": ({"prompt_lookup_num_tokens": 2}, "generate is set to assisted generation"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_sampling_from_the_model_is_refused(model: PreTrainedModel, tmp_path: Path, case: str) -> None:
    settings, message = REFUSED[case]
    with GenerateRecorder(tmp_path) as recorder, pytest.raises(UsageError, match=message):
        generate(model, recorder, **settings)
    assert read(tmp_path) == []


def test_a_prompt_that_is_not_known_as_ids_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    embedded = model.get_input_embeddings()(torch.tensor([[5, 6, 7]])).detach()
    with GenerateRecorder(tmp_path) as recorder:
        with pytest.raises(UsageError, match="came as embeddings"):
            model.generate(inputs_embeds=embedded, do_sample=True, max_new_tokens=2, custom_generate=recorder)
        # and so is one of which a part stands only in a cache
        ids, first = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 8]])
        given: dict[str, Any] = {"do_sample": True, "max_new_tokens": 2, "custom_generate": recorder}
        given["past_key_values"] = model(first, use_cache=True).past_key_values
        with pytest.raises(UsageError, match="past_key_values"):
            model.generate(ids, attention_mask=torch.ones(1, 7, dtype=torch.long), **given)
        # but a cache of ids that are given too does no harm
        whole = torch.cat([first, ids], 1)
        given["past_key_values"] = model(first, use_cache=True).past_key_values
        model.generate(whole, **given)
    assert [row["prompt_ids"] for row in read(tmp_path)] == [whole[0].tolist()]


def test_entries_for_other_than_the_waiting_rollouts_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with GenerateRecorder(tmp_path) as recorder:
        generate(model, recorder)
        with pytest.raises(UsageError, match="3 rollouts wait to be finished, reward has 2 entries"):
            recorder.finish(rewards=[1.0, 0.0])
        assert len(recorder.finish(rewards=[1.0, 0.0, 0.5])) == 3
    assert [row["reward"] for row in read(tmp_path)] == [1.0, 0.0, 0.5]


def test_settings_that_come_from_the_checkpoint_are_recorded(tmp_path: Path) -> None:
    # GIVEN a model whose generation_config.json has settings that the caller does not mention
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(
        temperature=0.6, top_k=20, top_p=0.95, do_sample=True, pad_token_id=PAD, eos_token_id=EOS
    )
    with GenerateRecorder(tmp_path) as recorder:
        model.generate(**batch(), max_new_tokens=3, custom_generate=recorder)
    row = read(tmp_path)[0]
    assert (row["temperature"], row["top_k"], row["top_p"]) == (0.6, 20, 0.95)


SETTINGS_OF_SCORES = {"plain": {"top_k": 0}, "tempered": {"temperature": 0.7, "top_k": 0}}


@pytest.mark.parametrize("settings", SETTINGS_OF_SCORES)
def test_a_model_audited_against_itself_is_where_it_was(tmp_path: Path, settings: str) -> None:
    # GIVEN float32 rollouts and the checkpoint that sampled them
    model = tiny_model("llama", seed=1)
    checkpoint = save(model, tmp_path / "checkpoint")
    with GenerateRecorder(tmp_path / "rollouts") as recorder:
        for seed in range(3):
            generate(model, recorder, seed, **SETTINGS_OF_SCORES[settings])
    # WHEN they are scored
    options = trm_audit.ScoreOptions(model=checkpoint, dtype="float32")
    trm_audit.score([str(tmp_path / "rollouts")], str(tmp_path / "scores"), options)
    scores = pa.concat_tables(pq.read_table(file) for file in (tmp_path / "scores" / "data").iterdir())
    # THEN nothing is between the two, as far as float16 can say
    assert scores["grade"].to_pylist() == ["sketch"] * 9
    flat = {name: np.concatenate(scores[name].to_pylist()) for name in ("kl_lower", "kl_estimate", "tv_upper")}
    assert flat["kl_lower"].max() == pytest.approx(0, abs=1e-6)
    assert flat["kl_estimate"].max() < 1e-3
    assert flat["tv_upper"].max() < 0.02
    ratio = np.concatenate(scores["log_ratio"].to_pylist())
    assert np.abs(ratio).max() < 1e-4


def test_the_bounds_of_a_recorded_run_hold_around_the_exact_values(tmp_path: Path) -> None:
    # GIVEN rollouts at a temperature, and a trainer whose weights have moved on
    model, moved = tiny_model("llama", seed=1), tiny_model("llama", seed=1)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std() * 0.3)
    checkpoint = save(moved, tmp_path / "checkpoint")
    with GenerateRecorder(tmp_path / "rollouts", Recipe(8, 64)) as recorder:
        for seed in range(6):
            generate(model, recorder, seed, temperature=0.9, top_k=0)
    options = trm_audit.ScoreOptions(model=checkpoint, dtype="float32")
    trm_audit.score([str(tmp_path / "rollouts")], str(tmp_path / "scores"), options)
    (shard,) = (tmp_path / "scores" / "data").iterdir()
    inside = total = 0
    for row in pq.read_table(shard).to_pylist():
        # WHEN both distributions are computed whole, in float64
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        at = slice(len(row["prompt_ids"]) - 1, -1)
        with torch.no_grad():
            p, q = ((one(ids).logits[0, at].double() / 0.9).log_softmax(1) for one in (model, moved))
        kl, tv = (p.exp() * (p - q)).sum(1), (p.exp() - q.exp()).abs().sum(1) / 2
        # THEN the intervals hold them, and the estimate is near
        for t in range(len(row["response_ids"])):
            inside += row["kl_lower"][t] - 1e-6 <= kl[t] <= row["kl_upper"][t] + 1e-6
            inside += row["tv_lower"][t] - 1e-6 <= tv[t] <= row["tv_upper"][t] + 1e-6
            total += 2
        assert row["seq_sum_kl_estimate"] == pytest.approx(float(kl.sum()), rel=0.3)
        assert float(kl.max()) > 0.01
    assert inside == total
