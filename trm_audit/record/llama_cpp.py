"""Recording what llama-cpp-python samples.

    from trm_audit.record.llama_cpp import LlamaRecorder

    with LlamaRecorder("rollouts/", llm) as recorder:
        out = llm.create_completion(prompt, max_tokens=256, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
        recorder.finish(out, reward=1.0, group_id="sum-07")

Every way of sampling with a `Llama` (completions, chat, streams, a draft model) draws its tokens in `Llama.generate`.
A logits processor alone is not told the last token of a response, nor the settings, and an error that it raises is
printed and passed over. So the recorder stands around that method of one `Llama` until it is closed: it sees the
settings that were really given, puts itself behind the last logits processor, and takes each token as it comes out.

llama.cpp truncates before it tempers: top-k, top-p and min-p look at the distribution of temperature 1. Other engines
temper first, and so does `score` where it is given raw logits. What is stored here is of the policy that sampled.
Written against llama-cpp-python 0.3; its defaults (top_k 40, top_p 0.95, min_p 0.05) truncate.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trm_audit.errors import BadInput, UsageError
from trm_audit.record.evidence import Recipe, TokenEvidence, evidence
from trm_audit.record.rows import list_too_short
from trm_audit.record.writer import RolloutWriter
from trm_audit.rollout import Sampling

TOKENS_AT_ONCE = 32
"""Tokens whose logits are held until they are projected together: one at a time would cost several times as much."""

OFF: dict[str, object] = {
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "tfs_z": 1.0,
    "mirostat_mode": 0,
    "grammar": None,
}
"""Settings that change the distribution in ways that are not rebuilt here, and their value when they are off."""
HARMLESS = {"tokens", "reset", "penalize_nl", "mirostat_tau", "mirostat_eta", "logits_processor", "stopping_criteria"}
LOGIT_BIAS = "logit_bias_processor"
"""What llama-cpp-python calls the processor that it makes of `logit_bias`."""
AFTER = "Call finish() once after each completion, at the end of its stream."
LOOSER = 1e-4
"""What a threshold may be off by rounding, relative to it, before a drawn token speaks against the settings."""

log = logging.getLogger(__name__)

Row = NDArray[np.float32]


@dataclass(frozen=True)
class Settings:
    """What llama.cpp does to logits, in this order; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    Worked instance: Settings(top_k=40, top_p=.95, min_p=.05, temperature=.8), the defaults of `create_completion`.
    """

    top_k: int
    top_p: float
    min_p: float
    temperature: float

    @property
    def sampling(self) -> Sampling:
        top_k = self.top_k if self.top_k > 0 else -1
        return Sampling(self.temperature, min(self.top_p, 1.0), top_k, "processed")


def sampled_logits(scores: Row, token: int, settings: Settings) -> Row:
    """Logits of the policy that a token was drawn from: truncated with -inf, then tempered.

    Args:
        scores: [V] float32 logits as llama.cpp's sampler chain begins with them.
        token: what was drawn.
        settings: of the chain.

    Raises:
        BadInput: the settings rule the token out.

    Sums run in float32 and one after another, as in llama.cpp, so that top-p ends at the same token. Where it does not
    for a rounding, the token that was drawn is put back. Of tokens that tie with the last one all are kept.
    """
    kept = scores >= _threshold(scores, settings)
    if not kept[token]:
        looser = replace(settings, top_p=settings.top_p * (1 + LOOSER), min_p=settings.min_p * (1 - LOOSER))
        if not scores[token] >= _threshold(scores, looser):
            raise BadInput(
                f"llama.cpp drew token {token}, which {settings} rule out",
                next_step="Another version's sampler differs from what is rebuilt here: use top_k=0, top_p=1, min_p=0.",
            )
        kept[token] = True
    tempered = scores / np.float32(settings.temperature)
    return np.where(kept, tempered, np.float32(-np.inf))


def _threshold(scores: Row, settings: Settings) -> np.float32:
    """The smallest logit that is kept."""
    threshold = np.float32(-np.inf)
    if settings.top_k > 0:
        last = max(0, len(scores) - settings.top_k)
        threshold = np.partition(scores, last)[last]
    if settings.top_p < 1:
        threshold = _top_p_threshold(scores, threshold, in_order=settings.top_k <= 0, top_p=np.float32(settings.top_p))
    if settings.min_p > 0:
        threshold = max(threshold, scores.max() + np.log(np.float32(settings.min_p)))
    return threshold


def _top_p_threshold(scores: Row, threshold: np.float32, in_order: bool, top_p: np.float32) -> np.float32:
    """The logit at which the probabilities of those above `threshold`, largest first, reach `top_p`.

    llama.cpp normalises in the order of the tokens, after top-k in that of the logits.
    """
    values = np.sort(scores[scores >= threshold])[::-1]
    odds = np.exp(values - values[0])
    summed = np.exp(scores - values[0]) if in_order else odds
    reached = np.cumsum(odds / np.cumsum(summed)[-1])
    return np.float32(values[min(int(np.searchsorted(reached, top_p)), len(values) - 1)])


class LlamaRecorder:
    """Context manager that records all that one `Llama` samples, until it is closed.

    Args:
        target: a folder for the shards, or a RolloutWriter, which its owner closes.
        llm: a `llama_cpp.Llama`. Its `generate` is replaced meanwhile, on this one object.
        recipe: what is kept of each distribution; `Recipe()` by default.

    Raises:
        UsageError: it is being recorded already.

    While recording, `generate`, `create_completion` and `create_chat_completion` raise UsageError for settings that
    are not rebuilt (`OFF`, and temperature 0): they would have to be switched off. Logits processors and a logit bias
    are fine, since their result is what is recorded. A prompt is what llama.cpp evaluated, template and
    begin-of-sequence token included; a response has every token that was drawn, the end-of-sequence token and the
    tokens of a stop string too. The column `logits_processors` names min-p, a logit bias and other processors.
    """

    def __init__(
        self, target: str | os.PathLike[str] | RolloutWriter, llm: Any, *, recipe: Recipe | None = None
    ) -> None:
        if "generate" in vars(llm):
            raise UsageError("this Llama is being recorded already", next_step="Close the other recorder first.")
        self._owns_writer = not isinstance(target, RolloutWriter)
        self.writer = target if isinstance(target, RolloutWriter) else RolloutWriter(target, engine="llama.cpp")
        self.recipe = recipe or Recipe()
        self._llm, self._generate = llm, llm.generate
        self._latest: _Generation | None = None
        self._said = False
        llm.generate = self._recorded

    def __enter__(self) -> LlamaRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # nobody knows whether the latest response is whole
            self._latest = None
        self.close()

    def finish(self, completion: Mapping[str, Any] | None = None, **columns: Any) -> str:
        """Hands the rollout of the latest generation to the writer; returns its id.

        Args:
            completion: what `create_completion` or `create_chat_completion` returned, or the last piece of a stream:
                its `finish_reason` is stored.
            columns: `reward`, `group_id`, `rollout_id`, `policy_version` and others, as `RolloutWriter.add` has them.

        Raises:
            UsageError: nothing was generated since the last call.
            BadInput: what `RolloutWriter.add` refuses.

        A rollout that is not finished when the next one begins, or on closing, is stored without these columns.
        """
        if self._latest is None:
            raise UsageError("there is no rollout to finish", next_step=AFTER)
        if completion is not None:
            columns.setdefault("finish_reason", completion["choices"][0]["finish_reason"])
        latest, self._latest = self._latest, None
        if latest.shaping:
            columns.setdefault("logits_processors", ", ".join(latest.shaping))
        return self.writer.add(
            prompt_ids=latest.prompt,
            response_ids=latest.response,
            evidence=latest.evidence(),
            sampling=latest.settings.sampling,
            **columns,
        )

    def close(self) -> None:
        """Stores the latest rollout and gives the `Llama` its own `generate` back; again, does nothing."""
        vars(self._llm).pop("generate", None)
        try:
            if self._latest is not None:
                self.finish()
        finally:
            if self._owns_writer:
                self.writer.close()

    def _recorded(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """Stands in for `Llama.generate`."""
        call = inspect.signature(self._generate).bind(tokens, *args, **kwargs)
        call.apply_defaults()
        others = [*(call.arguments["logits_processor"] or ())]
        mine = _Generation(_settings(call), list(tokens), self._llm.n_vocab(), self.recipe, others)
        if not self._said and (few := list_too_short(mine.settings.sampling, self.recipe.k)):
            self._said = True
            log.warning("%s", few)
        call.arguments["logits_processor"] = [*others, mine.hold]
        if self._latest is not None:
            self.finish()
        self._latest = mine
        steps, guesses = self._generate(*call.args, **call.kwargs), None
        while True:
            if self._latest is not mine:
                raise UsageError("a response went on after its rollout was finished", next_step=AFTER)
            try:
                token = steps.send(guesses)
                mine.drew(token)
            except StopIteration:
                return
            except BaseException:
                self._latest = None
                raise
            guesses = yield token


class _Generation:
    """One response while it grows.

    Attributes:
        prompt: token ids that were evaluated before the first token was drawn.
        response: token ids drawn so far.
        shaping: what else than temperature, top-k and top-p shaped the distribution.
    """

    def __init__(
        self, settings: Settings, prompt: list[int], vocab_size: int, recipe: Recipe, processors: Sequence[object]
    ) -> None:
        self.settings, self.prompt, self.response = settings, prompt, list[int]()
        names = [getattr(one, "__name__", type(one).__name__) for one in processors]
        self.shaping = [f"min_p={settings.min_p:g}"] if settings.min_p > 0 else []
        self.shaping += ["logit_bias" if name == LOGIT_BIAS else name for name in names]
        self._vocab_size, self._recipe = vocab_size, recipe
        self._held: Row | None = None
        self._rows: list[Row] = []
        self._parts: list[TokenEvidence] = []

    def hold(self, input_ids: NDArray[np.intc], scores: Row) -> Row:
        """The logits processor. Nothing may be raised here: ctypes prints an error and goes on."""
        if not self.response:  # what stands before the prompt with reset=False is part of it
            self.prompt = input_ids.tolist()
        self._held = np.array(scores, dtype=np.float32)  # a copy: the memory is llama.cpp's
        return scores

    def drew(self, token: int) -> None:
        """Takes the token that was drawn from the logits at hand."""
        scores, self._held = self._held, None
        if scores is None or len(scores) != self._vocab_size:
            raise BadInput(
                f"llama.cpp drew token {len(self.response)} of a response and did not show all its logits",
                next_step="Did another logits processor fail? llama-cpp-python prints such errors and goes on.",
            )
        self._rows.append(sampled_logits(scores, token, self.settings))
        self.response.append(int(token))
        if len(self._rows) == TOKENS_AT_ONCE:
            self._project()

    def evidence(self) -> TokenEvidence | None:
        """Of all tokens; None if there are none."""
        if self._rows:
            self._project()
        return TokenEvidence.cat(self._parts) if self._parts else None

    def _project(self) -> None:
        logits = torch.from_numpy(np.stack(self._rows))
        tokens = self.response[-len(self._rows) :]
        self._parts.append(evidence(logits, tokens, self.settings.sampling, self._recipe))
        self._rows = []


def _settings(call: inspect.BoundArguments) -> Settings:
    """What a call of `generate` asks for, if it can be rebuilt."""
    given = call.arguments
    for name, value in given.items():
        if name in HARMLESS or name in ("top_k", "top_p", "min_p", "temp"):
            continue
        off = OFF.get(name, call.signature.parameters[name].default)
        if value != off and not (name == "typical_p" and value > 1):
            raise UsageError(
                f"{name}={value!r} changes the distribution in a way that is not recorded",
                next_step=f"Sample with {name}={off!r}. Temperature, top_k, top_p and min_p are fine.",
            )
    settings = Settings(int(given["top_k"]), float(given["top_p"]), float(given["min_p"]), float(given["temp"]))
    if not (0 < settings.temperature < np.inf and settings.top_p > 0 and settings.min_p <= 1):
        raise UsageError(
            f"{settings} cannot be recorded",
            next_step="Temperature and top_p are above 0, min_p at most 1: greedy decoding has no distribution.",
        )
    return settings
