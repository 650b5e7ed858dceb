"""What the recorder keeps of vLLM's requests, by both interfaces, against float64 distributions of the same logits.

The engines below do to a recorder what vLLM's two model runners do: they batch, move, preempt and resume requests, read
prompts in chunks, show logits before the tokens are drawn and write over them afterwards.
"""

from __future__ import annotations

import enum
import errno
import logging
import math
import pickle
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import trm_audit
from trm_audit.errors import UsageError
from trm_audit.record import running
from trm_audit.record.vllm import FOLDER, RECIPE, VllmRecorder

VOCAB, EOS, CHUNK, SLOTS, LONGEST = 50, 2, 3, 4, 64
K, M = 8, 64
HALF = 2.0**-11


class Direction(enum.Enum):
    UNIDIRECTIONAL = 1
    SWAP = 2


def params(**given: Any) -> Any:
    """As vLLM's SamplingParams are when they reach a worker."""
    plain = {
        "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 6, "min_tokens": 0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": None,
        "bad_words": [], "stop_token_ids": [], "all_stop_token_ids": {EOS}, "ignore_eos": False, "extra_args": None,
    }  # fmt: skip
    return SimpleNamespace(**plain | given)


def config(**given: Any) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=LONGEST),
        scheduler_config=SimpleNamespace(async_scheduling=given.pop("async_scheduling", False)),
        parallel_config=SimpleNamespace(tensor_parallel_size=given.pop("tensor_parallel_size", 1)),
        speculative_config=None,
        **given,
    )


@dataclass(eq=False)
class Job:
    """A request, and what an engine has done for it. `script` are the tokens to draw, None for random ones."""

    name: str
    prompt: list[int]
    params: Any
    script: dict[int, int] = field(default_factory=dict)
    output: list[int] = field(default_factory=list)
    shown: list[np.ndarray] = field(default_factory=list)
    read: int = 0
    over: bool = False

    def __post_init__(self) -> None:
        if self.params.extra_args is None:
            self.params.extra_args = {"rollout_id": self.name}

    def logits(self) -> np.ndarray:
        return np.random.default_rng([*self.name.encode(), len(self.output)]).normal(0, 3, VOCAB)

    def draw(self) -> int:
        p = by_definition(self.logits(), self.params)
        return self.script.get(len(self.output), int(np.random.default_rng(len(self.output)).choice(VOCAB, p=p)))

    def ended(self) -> bool:
        stop = bool(self.output) and self.output[-1] == EOS
        return stop or len(self.output) >= self.params.max_tokens


def by_definition(logits: np.ndarray, settings: Any) -> np.ndarray:
    """Probabilities that one row of raw logits gives, token by token, in float64."""
    scaled = [float(value) / settings.temperature for value in logits]
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    weights = {token: math.exp(scaled[token] - scaled[order[0]]) for token in order}
    kept = [token for token in order if weights[token] >= settings.min_p]
    kept = kept[: settings.top_k] if settings.top_k > 0 else kept
    total, before, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if before < settings.top_p:
            nucleus.append(token)
        before += weights[token] / total
    out = np.zeros(len(scaled))
    for token in nucleus:
        out[token] = weights[token]
    return out / out.sum()


class FirstEngine:
    """As the first model runner: a dense batch, and a list of tokens that grows after each step.

    Removed places are filled by new requests first, and then by moving the last ones down, as vLLM's batch does; only
    what stays empty is reported as removed.
    """

    finish = 0

    def __init__(self) -> None:
        self.recorder = VllmRecorder(config(), torch.device("cpu"), False)
        self.batch: list[Job] = []

    def step(self, jobs: list[Job]) -> None:
        """One step with these jobs in the batch; an empty list is the step that tells of the last removal."""
        empty = [i for i, job in enumerate(self.batch) if job not in jobs]
        added, moved = [], []
        places: list[Job | None] = [job if job in jobs else None for job in self.batch]
        for job in jobs:
            if job in self.batch:
                continue
            place = empty.pop(0) if empty else len(places)
            places[place : place + 1] = [job]
            added.append((place, job.params, job.prompt, job.output))
        removed = [*empty]
        while removed and any(job is not None for job in places[removed[0] :]):
            last, to = max(i for i, job in enumerate(places) if job is not None), removed.pop(0)
            places[to], places[last] = places[last], None
            moved.append((last, to, Direction.UNIDIRECTIONAL))
        self.batch = [job for job in places if job is not None]
        if len(self.batch) > 2:  # as an attention backend reorders it
            self.batch[0], self.batch[1] = self.batch[1], self.batch[0]
            moved.append((0, 1, Direction.SWAP))
        update = SimpleNamespace(batch_size=len(self.batch), removed=removed, added=added, moved=moved)
        self.recorder.update_state(update if added or moved or removed else None)
        if self.batch:
            self._sample()

    def _sample(self) -> None:
        rows = []
        for job in self.batch:
            tempered = torch.tensor(job.logits(), dtype=torch.float32) / max(job.params.temperature, 1e-9)
            least = tempered.max() + math.log(job.params.min_p) if job.params.min_p else -math.inf
            rows.append(tempered.masked_fill(tempered < least, -math.inf))
        logits = torch.stack(rows)
        assert self.recorder.apply(logits) is logits
        logits.fill_(math.nan)  # what follows works in place
        for job in self.batch:
            job.read += CHUNK
            if job.read >= len(job.prompt) + len(job.output):
                job.shown.append(job.logits())
                job.output.append(job.draw())
                job.read = len(job.prompt) + len(job.output)
                job.over = job.ended()

    def preempt(self, job: Job) -> None:
        job.read = 0


class SecondEngine:
    """As Model Runner V2: slots that nobody announces to be free, tokens on the device, and one step too many."""

    finish = 1

    def __init__(self) -> None:
        tokens = torch.full((SLOTS, LONGEST), -1, dtype=torch.int32)
        self.states = SimpleNamespace(
            all_token_ids=SimpleNamespace(gpu=tokens),
            total_len=SimpleNamespace(gpu=torch.zeros(SLOTS, dtype=torch.int32)),
            prompt_len=SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32)),
            prefill_len=SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32)),
        )
        self.recorder = VllmRecorder(config(async_scheduling=True), self.states)
        self.slots: dict[Job, int] = {}
        self.free = [*range(SLOTS)]
        self.random = np.random.default_rng(7)

    def step(self, jobs: list[Job]) -> None:
        for job in [one for one in self.slots if one not in jobs]:
            self.free.append(self.slots.pop(job))
        writes = []
        for job in [one for one in jobs if one not in self.slots]:
            slot = self.slots[job] = self.free.pop()
            self.states.prompt_len.np[slot] = len(job.prompt)
            self.states.prefill_len.np[slot] = len(job.prompt) + len(job.output)
            writes.append((slot, [*job.prompt, *job.output]))
            self.recorder.add_request(slot, job.params)
        for slot, ids in writes:
            self.states.all_token_ids.gpu[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            self.states.total_len.gpu[slot] = len(ids)
        self.recorder.apply_staged_writes()
        if jobs:
            self._sample([jobs[i] for i in self.random.permutation(len(jobs))])

    def _sample(self, batch: list[Job]) -> None:
        for job in batch:
            job.read = min(job.read + CHUNK, len(job.prompt) + len(job.output))
        logits = torch.stack([torch.tensor(job.logits(), dtype=torch.float32) for job in batch])
        ctx = SimpleNamespace(
            idx_mapping_np=np.array([self.slots[job] for job in batch]),
            seq_lens_upper_bound_np=np.array([job.read for job in batch]),
        )
        assert self.recorder.apply(logits, ctx) is logits
        logits.fill_(math.nan)
        for job in batch:
            slot = self.slots[job]
            if job.read >= self.states.prefill_len.np[slot]:
                token = job.draw()
                self.states.all_token_ids.gpu[slot, job.read] = token
                self.states.total_len.gpu[slot] += 1
                if not job.over:
                    job.shown.append(job.logits())
                    job.output.append(token)
                    job.over = job.ended()

    def preempt(self, job: Job) -> None:
        job.read = 0


ENGINES = {"first": FirstEngine, "second": SecondEngine}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, "")
    monkeypatch.setenv(RECIPE, "")
    VllmRecorder.to(tmp_path / "rollouts", k=K, dim=M, seed=5)
    return tmp_path / "rollouts"


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = ENGINES[request.param]()
    yield made
    made.recorder.close()


def serve(engine: Any, jobs: list[Job], *, steps: int = 100, away: dict[str, range] | None = None) -> None:
    """Steps until all jobs are over; `away` says in which steps a job is preempted."""
    last: dict[Job, int] = {}
    for step in range(steps):
        for job in jobs:
            if job.over:
                last.setdefault(job, step)
        here = [job for job in jobs if step - last.get(job, step) < engine.finish or not job.over]
        gone = [job for job in here if step in (away or {}).get(job.name, ())]
        for job in gone:
            engine.preempt(job)
        here = [job for job in here if job not in gone][:SLOTS]
        engine.step(here)
        if not here and not gone:
            return


def read(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(folder.glob("rollouts-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert len({row["rollout_id"] for row in rows}) == len(rows)
    return {row["rollout_id"]: row for row in rows}


def check(row: dict[str, Any], job: Job) -> None:
    """The row says of each token what its distribution was, in float64."""
    assert row["prompt_ids"] == job.prompt
    assert row["response_ids"] == job.output
    assert job.output
    for t, token in enumerate(job.output):
        p = by_definition(job.shown[t], job.params)
        assert row["rollout_logprobs"][t] == pytest.approx(math.log(p[token]), abs=2e-5)
        top = sorted(range(VOCAB), key=lambda one: -p[one])[: min(K, int((p > 0).sum()))]
        found = [one for one, value in zip(row["rollout_topk_ids"][t], row["rollout_topk_logprobs"][t], strict=True)
                 if value > -math.inf]  # fmt: skip
        assert found == top
        values = [float(value) for value in row["rollout_topk_logprobs"][t][: len(top)]]
        assert values == pytest.approx([math.log(p[one]) for one in top], rel=1.1 * HALF, abs=1e-5)
        tail = [one for one in range(VOCAB) if one not in top]
        assert row["rollout_tail_mass"][t] == pytest.approx(sum(p[one] for one in tail), rel=1e-4, abs=1e-30)
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        assert row["rollout_entropy"][t] == pytest.approx(entropy, abs=1e-4)


def close(engine: Any) -> None:
    engine.recorder.close()


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 12},
    {"temperature": 1.3, "top_k": 5},
    {"min_p": 0.1, "temperature": 0.9},
]


def test_each_recorded_token_has_the_distribution_that_it_was_drawn_from(engine: Any, folder: Path) -> None:
    """GIVEN requests of many settings and lengths, more than the batch holds, their prompts read in chunks."""
    jobs = [
        Job(f"r{i}", [*range(3, 5 + i % 7)], params(max_tokens=3 + i % 5, **SETTINGS[i % len(SETTINGS)]))
        for i in range(11)
    ]
    serve(engine, jobs)
    close(engine)

    rows = read(folder)

    assert sorted(rows) == sorted(job.name for job in jobs)
    for job in jobs:
        check(rows[job.name], job)
        assert rows[job.name]["engine"] == "vllm"
        assert rows[job.name]["logprobs_mode"] == "processed"


def test_settings_and_names_stand_in_the_columns(engine: Any, folder: Path) -> None:
    named = {"rollout_id": "mine", "group_id": "q7", "policy_version": 3}
    serve(engine, [Job("a", [5, 6], params(temperature=0.8, top_p=0.9, top_k=12, extra_args=named))])
    close(engine)

    row = read(folder)["mine"]

    assert (row["temperature"], row["top_p"], row["top_k"]) == (0.8, 0.9, 12)
    assert (row["group_id"], row["policy_version"], row["finish_reason"]) == ("q7", 3, "length")
    assert (row["sketch_dim"], row["sketch_seed"], row["sketch_vocab_size"]) == (M, 5, VOCAB)


def test_a_request_that_was_preempted_and_resumed_is_one_rollout(engine: Any, folder: Path) -> None:
    """GIVEN two rollouts of one prompt without names, both away for a while, one of them twice."""
    jobs = [Job(name, [5, 6, 7, 8], params(max_tokens=12, extra_args={"group_id": "g"})) for name in ("a", "b")]
    jobs.append(Job("c", [5, 6], params(max_tokens=9)))
    gone = {"a": range(4, 6), "b": range(5, 9), "c": [*range(3, 5), *range(8, 11)]}
    serve(engine, jobs, away=gone)
    close(engine)

    rows = [*read(folder).values()]

    assert len(rows) == 3
    for job in jobs:
        check(next(row for row in rows if row["response_ids"] == job.output), job)


def test_a_response_ends_with_its_stop_token_though_the_engine_went_on(folder: Path) -> None:
    engine = SecondEngine()
    stopped = Job("stopped", [5, 6], params(max_tokens=9), script={3: EOS})
    serve(engine, [stopped, Job("long", [7], params(max_tokens=9))])
    close(engine)

    row = read(folder)["stopped"]

    check(row, stopped)
    assert row["response_ids"][-1] == EOS
    assert len(row["response_ids"]) == 4
    assert row["finish_reason"] == "stop"


def test_a_stop_token_that_the_request_ignores_ends_nothing(engine: Any, folder: Path) -> None:
    job = Job("a", [5, 6], params(max_tokens=5, ignore_eos=True), script={1: EOS})
    job.ended = lambda: len(job.output) >= 5  # type: ignore[method-assign]
    serve(engine, [job])
    close(engine)

    check(read(folder)["a"], job)


def test_a_prompt_of_embeddings_is_passed_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FirstEngine()
    added = SimpleNamespace(batch_size=1, removed=[], added=[(0, params(), None, [])], moved=[])
    engine.recorder.update_state(added)
    engine.recorder.apply(torch.zeros(1, VOCAB))
    close(engine)

    assert "embeddings are not recorded" in caplog.text
    assert read(folder) == {}


def test_greedy_requests_and_those_left_out_are_not_recorded(engine: Any, folder: Path) -> None:
    jobs = [
        Job("greedy", [5], params(temperature=1e-9)),
        Job("out", [5], params(extra_args={"record": False})),
        Job("in", [5, 6], params()),
    ]
    jobs[0].draw = lambda: 7  # type: ignore[method-assign]
    serve(engine, jobs)
    close(engine)

    assert [*read(folder)] == ["in"]


def test_what_was_aborted_is_written_as_far_as_it_went(engine: Any, folder: Path) -> None:
    job, other = Job("a", [5, 6], params(max_tokens=30)), Job("b", [7], params(max_tokens=4))
    for _ in range(5):
        engine.step([job])
    for _ in range(3):
        engine.step([other])
    close(engine)

    row = read(folder)["a"]

    check(row, job)
    assert row["finish_reason"] is None
    assert len(row["response_ids"]) == 5


def test_aborted_requests_are_not_waited_for_for_ever(
    engine: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(running, "PARKED_SECONDS", -1.0)
    monkeypatch.setattr(running, "BLOCK_STEPS", 2)
    drawn = {0: 5, 1: 6, 2: 7, 3: 8}
    gone, other = Job("gone", [5, 6], params(max_tokens=30), drawn), Job("other", [7], params(max_tokens=30))
    for step in range(9):
        engine.step([gone, other] if step < 4 else [other])
    engine.recorder._running.flush()

    assert [*read(folder)] == ["gone"]
    assert "left the batch 300 s ago without having ended" in caplog.text


def test_an_engine_that_comes_to_rest_has_all_its_rollouts_on_the_disk(
    engine: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody closes the recorder: a worker may be killed after the run."""
    monkeypatch.setattr(running, "IDLE_SECONDS", 0.05)
    at_rest = type(engine)()
    jobs = [Job("a", [5, 6], params()), Job("b", [5, 6, 7], params(max_tokens=9))]
    for _ in range(10):
        at_rest.step([job for job in jobs if not job.over])
        if all(job.ended() for job in jobs):
            break
    limit = time.monotonic() + 20
    while len(read(folder)) < 2 and time.monotonic() < limit:
        time.sleep(0.05)

    for job in jobs:
        check(read(folder)[job.name], job)
    at_rest.recorder.close()


def test_an_empty_batch_is_written_at_once(folder: Path) -> None:
    engine = FirstEngine()
    job = Job("a", [5, 6], params())
    serve(engine, [job])

    check(read(folder)["a"], job)
    close(engine)


def test_a_response_that_the_engine_took_back_is_not_recorded(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FirstEngine()
    job, other = Job("a", [5, 6], params(max_tokens=8)), Job("b", [5, 6], params(max_tokens=8))
    for _ in range(4):
        engine.step([job, other])
    del job.output[-2:], job.shown[-2:]
    with caplog.at_level(logging.WARNING):
        serve(engine, [job, other])
    close(engine)

    assert [*read(folder)] == ["b"]
    assert "took back" in caplog.text


def test_a_rollout_named_twice_is_written_once_and_the_engine_goes_on(
    engine: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Job("a", [5, 6], params()), Job("a", [5, 6, 7], params())
    serve(engine, [first])
    serve(engine, [second])
    close(engine)

    check(read(folder)["a"], first)
    assert "was added before" in caplog.text


def test_what_else_shaped_the_distribution_is_named(engine: Any, folder: Path) -> None:
    given = {"repetition_penalty": 1.05, "logit_bias": {3: 1.0}, "min_p": 0.1}
    serve(engine, [Job("a", [5, 6], params(**given)), Job("b", [5, 6], params())])
    close(engine)

    rows = read(folder)

    assert rows["a"]["logits_processors"] == "min_p=0.1, repetition_penalty=1.05, logit_bias"
    assert rows["b"]["logits_processors"] is None


def spoiled(value: Any) -> Any:
    """A request whose column Parquet cannot store, which `validate_params` was not asked about."""
    return params(extra_args={"rollout_id": "bad", "policy_version": value})


def test_a_value_that_cannot_be_stored_costs_its_own_rollout_and_stops_no_engine(
    engine: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [Job("a", [5, 6], params()), Job("bad", [5, 6], spoiled(2**63)), Job("b", [7], params())]
    serve(engine, jobs)
    close(engine)

    rows = read(folder)

    assert sorted(rows) == ["a", "b"]
    check(rows["a"], jobs[0])
    assert "A rollout is not recorded" in caplog.text


def test_whatever_the_writer_raises_stops_no_engine_and_is_logged_once(
    engine: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: Any) -> None:
        raise ZeroDivisionError("by surprise")

    with monkeypatch.context() as patch:
        patch.setattr("trm_audit.record.writer.write_rollout_table", broken)
        serve(engine, [Job("a", [5, 6], params()), Job("b", [5, 6], params(max_tokens=4))])
        for _ in range(3):
            engine.recorder._running.flush()
        engine.recorder._running._rest(running.STUCK_SECONDS)
    said = [record.message for record in caplog.records if "by surprise" in record.message]
    close(engine)

    assert said == ["Rollouts are not written: by surprise"]
    assert sorted(read(folder)) == ["a", "b"]


def test_on_a_full_disk_rollouts_are_said_to_wait_and_are_written_later(
    engine: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    def full(file: Path) -> None:
        attempts.append(file)
        raise OSError(errno.ENOSPC, "No space left on device")

    engine.recorder._running._writer._rows_per_shard = 1
    with monkeypatch.context() as patch:
        patch.setattr("trm_audit.record.writer.sync_file", full)
        for name in ("a", "b", "c"):
            serve(engine, [Job(name, [5, 6], params())])
            engine.recorder._running.flush()
    assert len(attempts) == 1
    assert "Rollouts are kept in memory, 1 wait" in caplog.text
    assert "not recorded" not in caplog.text
    close(engine)

    assert sorted(read(folder)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "other",
    [{"temperature": 2.0}, {"min_p": 0.03}, {"logit_bias": {3: 1.0}}],
    ids=str,
)
def test_a_request_that_came_back_gets_its_own_evidence_and_not_that_of_one_sampled_otherwise(
    engine: Any, folder: Path, other: dict[str, Any]
) -> None:
    """GIVEN two requests at the same tokens without names, away at once; the later one comes back first."""
    mine = {"temperature": 0.5, "max_tokens": 4, "extra_args": {"group_id": "g"}}
    given = {"a": mine | {"logit_bias": {7: 1.0}}, "b": mine | {"logit_bias": {7: 1.0}} | other}
    jobs = [Job(name, [5], params(**one), script={0: 9, 1: 8}) for name, one in given.items()]
    for job in jobs:
        job.script |= {2: 11, 3: 12} if job.name == "a" else {2: 13, 3: 14}
        bias = np.arange(VOCAB) == next(iter(job.params.logit_bias))
        job.logits = lambda job=job, bias=bias: (  # type: ignore[method-assign, misc]
            np.random.default_rng(len(job.output)).normal(0, 0.3, VOCAB) + bias
        )
    first, second = jobs
    for here in (jobs, jobs, [], [second], [second, first], [second, first], [first], []):
        for job in jobs:
            if job not in here:
                engine.preempt(job)
        engine.step([job for job in here if not job.over or engine.finish])
    close(engine)

    rows = [*read(folder).values()]

    assert len(rows) == 2
    for job in jobs:
        check(next(row for row in rows if row["response_ids"] == job.output), job)


def test_a_top_k_above_what_is_kept_is_said_once(engine: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    serve(engine, [Job(f"r{k}", [5, 6], params(top_k=k)) for k in (K, 30, 31)])

    said = [record.message for record in caplog.records if "top_k" in record.message]

    assert said == [
        f"top_k 30 is above the {K} tokens that are kept: estimates of KL come out too high; "
        f"take k=30 in VllmRecorder.to or {RECIPE}."
    ]


def test_the_recorded_shards_are_valid(engine: Any, folder: Path) -> None:
    jobs = [Job(f"r{i}", [*range(3, 6 + i)], params(**SETTINGS[i % 4])) for i in range(6)]
    serve(engine, jobs)
    close(engine)

    found = trm_audit.validate([str(folder)], trm_audit.ValidateOptions())

    assert not found.errors
    assert found.grades == {"sketch": 6}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n": 4, "extra_args": {"rollout_id": "a"}}, "would name 4 rollouts"),
        ({"extra_args": {"policy_version": "v3"}}, "'v3', an integer is needed"),
        ({"extra_args": {"policy_version": 2**63}}, "9223372036854775808, which 64 bits do not hold"),
        ({"extra_args": {"policy_version": -(2**63) - 1}}, "which 64 bits do not hold"),
        ({"extra_args": {"rollout_id": "a\ud800"}}, r"rollout_id is 'a\\ud800', which is no Unicode text"),
        ({"extra_args": {"group_id": "\udfff"}}, "group_id is .* which is no Unicode text"),
        ({"thinking_token_budget": 100}, "thinking_token_budget puts tokens in place"),
        ({"trace_decode_token_ids": [1, 2]}, "trace_decode_token_ids puts tokens in place"),
    ],
)
def test_a_request_that_cannot_be_recorded_is_refused_with_the_way_out(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VllmRecorder.validate_params(params(**given))


@pytest.mark.parametrize(
    "given",
    [{}, {"n": 4}, {"n": 4, "extra_args": {"group_id": "g"}}, {"temperature": 0.0},
     {"thinking_token_budget": 9, "extra_args": {"record": False}}],
)  # fmt: skip
def test_other_requests_are_let_through(given: dict[str, Any]) -> None:
    assert VllmRecorder.validate_params(params(**given)) is None


@pytest.mark.parametrize(
    ("given", "first", "said"),
    [
        ({"async_scheduling": True}, True, "async_scheduling=False"),
        ({"speculative_config": SimpleNamespace()}, True, "without speculative_config"),
        ({"speculative_config": SimpleNamespace()}, False, "without speculative_config"),
        ({"watermark_config": SimpleNamespace()}, False, "watermarking"),
    ],
)
def test_an_engine_that_hides_what_it_samples_is_refused(given: dict[str, Any], first: bool, said: str) -> None:
    made = config(async_scheduling=given.pop("async_scheduling", False))
    made = SimpleNamespace(**vars(made) | given)
    where = torch.device("cpu") if first else SimpleNamespace(all_token_ids=None)
    with pytest.raises(UsageError, match=said):
        VllmRecorder(made, where)


def test_without_a_folder_the_error_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER)
    with pytest.raises(UsageError, match=f"set {FOLDER}=rollouts/"):
        VllmRecorder(config(), torch.device("cpu"))


def test_a_recipe_that_is_none_is_refused_where_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="dim at least 64"):
        VllmRecorder.to("rollouts/", dim=8)
    monkeypatch.setenv(RECIPE, "20;64")
    with pytest.raises(UsageError, match=RECIPE):
        VllmRecorder(config(), torch.device("cpu"))


def test_the_class_travels_to_the_engine_process_by_its_name() -> None:
    assert pickle.loads(pickle.dumps(VllmRecorder.to("rollouts/"))) is VllmRecorder


@pytest.mark.parametrize(("rank", "rows"), [(0, 1), (1, 0)])
def test_of_the_workers_that_share_a_layer_one_records(
    rank: int, rows: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = ModuleType("vllm.distributed")
    theirs.get_tensor_model_parallel_rank = lambda: rank  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.distributed", theirs)
    engine = FirstEngine()
    engine.recorder.close()
    engine.recorder = VllmRecorder(config(tensor_parallel_size=2), torch.device("cpu"), False)
    serve(engine, [Job("a", [5, 6], params())])
    close(engine)

    assert len(read(folder)) == rows
