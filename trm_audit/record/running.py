"""Rollouts in the making inside a batching engine: which token was drawn from which logits, and when it ended.

An engine shows a recorder one [rows, V] of logits a step, before the tokens are drawn. So the rows of a step are held
until the next one, when their tokens are known (`hold`, `settle`). Evidence then stays on the device for a block of
steps and is taken to the CPU as a whole. A request that reached its length or drew a stop token has ended. One that
only left the batch may come back (a preempted one does), so it waits before it is written as it stands. Whatever goes
wrong with a rollout or with the disk is logged; the engine goes on.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.util import Finalize
from threading import Event, RLock, Thread
from typing import Any

import torch
from torch import Tensor

from trm_audit.errors import OutputError
from trm_audit.record.evidence import TENSORS, Recipe, TokenEvidence, evidence
from trm_audit.record.writer import RolloutWriter
from trm_audit.rollout import Sampling

BLOCK_STEPS = 64
"""Steps whose evidence is taken to the CPU together: a few MB of the device's memory."""
IDLE_SECONDS = 1.0
"""An engine that stood still for so long, with nothing left to do, gets everything that has ended written."""
STUCK_SECONDS = 30.0
"""As does one that stood still for so long and seems to have work: not every engine says who has left."""
PARKED_SECONDS = 300.0
"""How long a request that left without having ended (a stop string, an abort, a preemption) may come back."""
PARKED = (
    f"A request left the batch {PARKED_SECONDS:g} s ago without having ended: its rollout is written as it stands, "
    "without a finish_reason. If it comes back, the rest of it is not recorded."
)

log = logging.getLogger(__name__)

Drawn = Callable[[bool], tuple[Tensor, list[int]] | None]
"""What was drawn from the rows held: token ids [n] and which rows they are of; the others drew nothing. Called with
True between steps, with False at any time: None then says that the step is not over."""


@dataclass(eq=False)
class Request:
    """A request of the engine.

    Attributes:
        prompt_len: P.
        sampling: its settings, and in `logprobs_mode` the stage of the logits that are shown.
        prefix: [P + s] token ids: the prompt, and s tokens that were sampled before it entered the batch.
        stops: token ids that end it.
        limit: response tokens at most.
        min_p: what of min-p is still to be applied; 0 is off.
        shaping: what else shapes its distribution; requests that differ here are not the same one come back.
        columns: more that is said of the rollout: names as `RolloutWriter.add` takes them.
        tokens, parts: what was sampled since it entered, and the evidence, on the CPU.
        stopped: tokens up to the first stop token, None where there is none.
        rows: of the open block.
        left: when it left the batch (monotonic seconds), None while it is there.
    """

    prompt_len: int
    sampling: Sampling
    prefix: Any = None
    stops: frozenset[int] = frozenset()
    limit: int = 1 << 62
    min_p: float = 0.0
    shaping: object = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    parts: list[TokenEvidence] = field(default_factory=list)
    stopped: int | None = None
    rows: list[int] = field(default_factory=list)
    left: float | None = None

    @property
    def resumed(self) -> bool:
        return self.prefix is not None and len(self.prefix) > self.prompt_len

    def samples_as(self, other: Request) -> bool:
        """Whether both draw from one distribution where they stand at the same tokens, and are named alike."""
        return all(getattr(self, name) == getattr(other, name) for name in ("sampling", "min_p", "shaping", "columns"))

    @property
    def count(self) -> int:
        """Response tokens so far."""
        return len(self.prefix) - self.prompt_len + len(self.tokens) + len(self.rows)

    def take(self, part: TokenEvidence) -> None:
        """More tokens, with their evidence on the CPU."""
        new, before = part.token_ids.tolist(), len(self.tokens)
        if self.stopped is None:
            self.stopped = next((before + i + 1 for i, token in enumerate(new) if token in self.stops), None)
        self.tokens += new
        self.parts.append(part)

    def end(self) -> tuple[int, str] | None:
        """How many tokens it has and why it ended; an engine that looks ahead has sampled a token too many."""
        if self.stopped is not None and self.stopped <= self.limit:
            return self.stopped, "stop"
        return (self.limit, "length") if len(self.tokens) >= self.limit else None


@dataclass(frozen=True)
class Held:
    """One step: logits [n, V], of which request each row is, and how to ask for the tokens."""

    logits: Tensor
    requests: Sequence[Request]
    drawn: Drawn


class Running:
    """The requests of one engine process. Methods are to be called with `lock` held.

    Args:
        writer: gets what has ended.
        recipe: what is kept of each distribution.
    """

    def __init__(self, writer: RolloutWriter, recipe: Recipe) -> None:
        self.lock, self._writer, self._recipe = RLock(), writer, recipe
        self._live: dict[Request, None] = {}
        self._held: Held | None = None
        self._block: list[TokenEvidence] = []
        self._said: Counter[Hashable] = Counter()
        self._last, self._over = time.monotonic(), Event()
        self._finalize = Finalize(None, self.close, exitpriority=100)  # also in processes that run no atexit
        Thread(target=self._watch, name="trm-audit recorder", daemon=True).start()

    def enter(self, request: Request) -> None:
        self._live[request] = None

    def __contains__(self, request: Request) -> bool:
        return request in self._live

    def drop(self, request: Request, reason: str) -> None:
        """Records no more of it."""
        log.warning("A rollout is not recorded: %s", reason)
        self._live.pop(request, None)

    def leave(self, request: Request) -> None:
        if request.left is None:
            request.left = time.monotonic()

    def hold(self, logits: Tensor, rows: Sequence[int], requests: Sequence[Request], drawn: Drawn) -> None:
        """Copies rows of a step's logits [n, V] whose tokens are not drawn yet; `requests` has one for each row."""
        every = [*rows] == [*range(len(logits))]
        kept = logits.clone() if every else logits[torch.as_tensor(rows, device=logits.device)]
        self._held = Held(kept, requests, drawn)

    def settle(self, *, between_steps: bool = True) -> None:
        """Joins the held logits with their tokens, if these are there."""
        self._last = time.monotonic() if between_steps else self._last
        found = None if self._held is None else self._held.drawn(between_steps)
        if self._held is None or found is None:
            return
        held, self._held = self._held, None
        tokens, rows = found
        groups: dict[tuple[Sampling, float], list[int]] = {}
        for i, row in enumerate(rows):
            request = held.requests[row]
            groups.setdefault((_pending(request.sampling), request.min_p), []).append(i)
        for (sampling, min_p), members in groups.items():
            self._take(held, tokens, [rows[i] for i in members], members, sampling, min_p)
        if len(self._block) >= BLOCK_STEPS:
            self.close_block()

    def _take(
        self, held: Held, tokens: Tensor, rows: list[int], members: list[int], sampling: Sampling, min_p: float
    ) -> None:
        logits, ids = held.logits, tokens.to(held.logits.device).long()
        if len(rows) < len(held.requests):
            logits = logits[torch.as_tensor(rows, device=logits.device)]
        if len(members) < len(ids):
            ids = ids[torch.as_tensor(members, device=ids.device)]
        if min_p > 0:
            logits, sampling = _after_min_p(logits, ids, sampling, min_p)
        start = sum(len(part) for part in self._block)
        self._block.append(evidence(logits, ids, sampling, self._recipe))
        for i, row in enumerate(rows):
            held.requests[row].rows.append(start + i)

    def close_block(self) -> None:
        """Hands each request its evidence, on the CPU, and writes those that have ended."""
        if self._block:
            whole = TokenEvidence.cat(self._block)
            whole = replace(whole, **{name: getattr(whole, name).cpu() for name in TENSORS})
            self._block = []
            for request in self._live:
                if request.rows:
                    request.take(whole.rows(request.rows))
                    request.rows = []
        for request in [one for one in self._live if one.resumed]:
            self._join(request)
        long_ago = time.monotonic() - PARKED_SECONDS
        for request in [*self._live]:
            if request.end():
                self._write(request)
            elif request.left is not None and request.left < long_ago:
                self._say(logging.WARNING, "parked", PARKED)
                self._write(request)

    def _join(self, request: Request) -> None:
        """A request that came back gets what it had when it left."""
        prefix = _ids(request.prefix)
        prompt, sampled = prefix[: request.prompt_len], prefix[request.prompt_len :]
        for other in [one for one in self._live if one.left is not None and one is not request and one.parts]:
            same = other.samples_as(request) and _ids(other.prefix) == prompt
            if same and other.tokens[: len(sampled)] == sampled:
                later, request.prefix, request.tokens, request.parts = request.parts, prompt, [], []
                request.stopped = None
                for part in [TokenEvidence.cat(other.parts).rows(slice(len(sampled))), *later]:
                    request.take(part)
                del self._live[other]
                return
        self.drop(request, "it came back to the engine and its beginning is not known.")

    def _write(self, request: Request) -> None:
        del self._live[request]
        if not request.tokens:
            return
        self._attempt("A rollout is not recorded", partial(self._add, request))

    def _add(self, request: Request) -> None:
        count, reason = request.end() or (len(request.tokens), None)
        self._writer.add(
            prompt_ids=_ids(request.prefix)[: request.prompt_len],
            response_ids=request.tokens[:count],
            evidence=TokenEvidence.cat(request.parts).rows(slice(count)),
            sampling=request.sampling,
            finish_reason=reason,
            **request.columns,
        )

    def _attempt(self, failed: str, step: Callable[[], object]) -> None:
        """Nothing that goes wrong in recording may stop an engine: it is logged."""
        try:
            step()
        except OutputError as error:  # at most once in `RolloutWriter(seconds=...)`
            log.error("Rollouts are kept in memory, %d wait: %s", len(self._writer), error)
        except Exception as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            kind = (failed, type(error), trace and (trace.tb_frame.f_code, trace.tb_lineno))
            self._say(logging.ERROR, kind, f"{failed}: {error or type(error).__name__}")

    def _say(self, level: int, kind: Hashable, text: str) -> None:
        """Logs the first of a kind, the tenth, the hundredth: a client may send the same mistake for ever."""
        self._said[kind] += 1
        count = self._said[kind]
        if str(count).strip("0") == "1":
            log.log(level, "%s%s", text, f" ({count} times so far)" if count > 1 else "")

    def flush(self) -> None:
        """Brings everything that has ended to the disk, if that did not fail just now."""
        self._attempt("A block of steps is not recorded", self.close_block)
        if not self._writer.blocked:
            self._attempt("Rollouts are not written", self._writer.flush)

    def _watch(self) -> None:
        """A thread: an engine without work makes no calls."""
        while not self._over.wait(IDLE_SECONDS):
            with self.lock:
                still = time.monotonic() - self._last
                if still >= IDLE_SECONDS and (self._held or self._block or self._live or len(self._writer)):
                    self._attempt("A step is not recorded", partial(self._rest, still))

    def _rest(self, still: float) -> None:
        if self._held is not None and self._held.logits.is_cuda:
            torch.cuda.synchronize()  # the engine's work may be on another stream
        self.settle(between_steps=False)
        self.close_block()
        if still >= STUCK_SECONDS or all(request.left is not None for request in self._live):
            self.flush()

    def close(self) -> None:
        """Writes what there is, ended or not, and closes the writer. Closing again does nothing."""
        self._over.set()
        self._finalize.cancel()
        with self.lock:
            self._attempt("A step is not recorded", partial(self.settle, between_steps=False))
            self._attempt("A block of steps is not recorded", self.close_block)
            for request in [*self._live]:
                self._write(request)
            self._attempt("Rollouts are not written", self._writer.close)


def _ids(tokens: Any) -> list[int]:
    return tokens.tolist() if isinstance(tokens, Tensor) else [*tokens]


def _pending(sampling: Sampling) -> Sampling:
    """What is still to be done to the logits: requests that differ in their temperature are worked on together."""
    return replace(sampling, temperature=1.0) if sampling.logprobs_mode == "tempered" else sampling


def _after_min_p(logits: Tensor, ids: Tensor, sampling: Sampling, min_p: float) -> tuple[Tensor, Sampling]:
    """Raw logits tempered, without the tokens less than min_p times as probable as the first; not those drawn."""
    tempered = logits.float() / sampling.temperature
    drop = tempered < tempered.amax(1, keepdim=True) + math.log(min_p)
    return tempered.masked_fill(drop.scatter(1, ids[:, None], False), -torch.inf), replace(
        sampling, logprobs_mode="tempered"
    )
