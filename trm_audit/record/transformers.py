"""Recording what `generate` of transformers samples.

    from trm_audit.record.transformers import GenerateRecorder

    with GenerateRecorder("rollouts/") as recorder:
        out = model.generate(**inputs, do_sample=True, max_new_tokens=256, custom_generate=recorder)
        recorder.finish(rewards=rewards)  # one for each row of out; may be left out

A logits processor of one's own is run before temperature, top-k and top-p: it never sees what was sampled from, nor the
settings, of which some come from the checkpoint's generation_config.json and some from defaults (top_k is 50 if nobody
says otherwise). `custom_generate` hands over all of it: the whole chain of processors, the stopping criteria and the
settings as they were resolved. The recorder puts itself behind the last processor and lets the model's own sampling
loop run. So the evidence is of the very scores that went into the softmax, min-p, penalties and all.

transformers gives a `custom_generate` neither a streamer nor a tokenizer: pass `StopStringCriteria` among the
stopping_criteria instead of stop_strings.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trm_audit.errors import UsageError
from trm_audit.record.evidence import TENSORS, Recipe, TokenEvidence, evidence
from trm_audit.record.rows import list_too_short
from trm_audit.record.writer import RolloutWriter
from trm_audit.rollout import Sampling

if TYPE_CHECKING:
    from transformers import GenerationConfig

HELD_LOGITS = 1 << 22
"""Logits of several steps are worked on together, up to so many (16 MB in float32): the signs are then read once for
all of them, which makes a small batch's recording several times cheaper."""
SETTINGS = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"}
"""Processors that have columns of their own."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A rollout that waits for `finish`.

    Attributes:
        prompt_ids, response_ids: without padding.
        evidence: of the response, on the CPU.
        sampling: as `generate` resolved it.
        finish_reason: `stop` if the end-of-sequence token ended it, `length` if max_length did, None if something else
            did: a time limit, a stop string, a criterion of the caller's.
        group_id: shared by the rows of a prompt, None if each prompt has one row.
        columns: `logits_processors`, the names of those besides temperature, top-k and top-p, if there are any.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    evidence: TokenEvidence
    sampling: Sampling
    finish_reason: str | None
    group_id: str | None
    columns: dict[str, str]


class GenerateRecorder:
    """To be given to `model.generate` as `custom_generate`; writes one rollout for each row that is generated.

    Args:
        target: a folder, or a `RolloutWriter` that its owner closes.
        recipe: what is kept of each distribution; `Recipe()` by default.
    """

    def __init__(self, target: str | os.PathLike[str] | RolloutWriter, recipe: Recipe | None = None) -> None:
        self._owns = not isinstance(target, RolloutWriter)
        self.writer = target if isinstance(target, RolloutWriter) else RolloutWriter(target, engine="transformers")
        self.recipe = recipe or Recipe()
        self._waiting: list[Finished] = []
        self._said = False

    def __enter__(self) -> GenerateRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """Samples as the model does, and records. `generate` calls this; the result is what it returns.

        Raises:
            UsageError: it is not plain sampling, or the prompt is not known as token ids.
        """
        from transformers import LogitsProcessorList

        _check_mode(model, generation_config)
        _check_prompt(input_ids, generation_config, model_kwargs)
        prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
        steps = _Steps(len(prompts), _sampling(generation_config), self.recipe)
        if not self._said and (few := list_too_short(steps.sampling, self.recipe.k)):
            self._said = True
            log.warning("%s", few)
        out = model._sample(
            input_ids,
            logits_processor=LogitsProcessorList([*logits_processor, steps]),
            stopping_criteria=_watched(stopping_criteria, steps),
            generation_config=generation_config,
            synced_gpus=_synced(model),
            **model_kwargs,
        )
        groups = _groups(len(prompts), generation_config.num_return_sequences or 1)
        names = [type(one).__name__ for one in logits_processor if type(one).__name__ not in SETTINGS]
        columns = {"logits_processors": ", ".join(names)} if names else {}
        for prompt, found, group in zip(prompts, steps.rollouts(), groups, strict=True):
            response = found.token_ids.tolist()
            reason = _finish_reason(input_ids.shape[1] + len(response), response[-1], generation_config)
            self._waiting.append(Finished(prompt, response, found, steps.sampling, reason, group, columns))
        return out

    def finish(
        self,
        *,
        rewards: Sequence[float] | Tensor | None = None,
        group_ids: Sequence[str] | None = None,
        rollout_ids: Sequence[str] | None = None,
        policy_version: int | None = None,
        **columns: Sequence[object],
    ) -> list[str]:
        """Writes the rollouts of all calls of `generate` since the last `finish`; returns their ids.

        Args:
            rewards, group_ids, rollout_ids, columns: one entry for each row, in the order of what `generate` returned:
                with num_return_sequences = n, the n rows of a prompt stand together. Ids are random by default, and
                those n share a group.
            policy_version: of the weights.

        Raises:
            UsageError: there are not as many entries as rows.
        """
        given = {"reward": rewards, "group_id": group_ids, "rollout_id": rollout_ids, **columns}
        lists = {
            name: _listed(name, values, len(self._waiting)) for name, values in given.items() if values is not None
        }
        names = []
        for at, row in enumerate([*self._waiting]):
            self._waiting.pop(0)  # before it is added: what was refused once is not offered again
            own: dict[str, Any] = {"group_id": row.group_id, **row.columns}
            own |= {name: values[at] for name, values in lists.items()}
            names.append(
                self.writer.add(
                    prompt_ids=row.prompt_ids,
                    response_ids=row.response_ids,
                    evidence=row.evidence,
                    sampling=row.sampling,
                    policy_version=policy_version,
                    finish_reason=row.finish_reason,
                    **own,
                )
            )
        return names

    def close(self) -> None:
        """Writes what still waits, without rewards, and closes the writer if the recorder made it."""
        self.finish()
        if self._owns:
            self.writer.close()


class _Steps:
    """The scores of one call's steps, until enough of them are there to be worked on.

    It is the last of the logits processors, and sees the scores that a step samples from; `after` sees the tokens that
    came of them. A row that has ended gets padding, which is no token of the policy.
    """

    def __init__(self, rows: int, sampling: Sampling, recipe: Recipe) -> None:
        self.sampling, self._recipe, self._size = sampling, recipe, rows
        self._scores: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._sampled: list[Tensor] = []
        self._going: Tensor | None = None
        self._parts: list[TokenEvidence] = []
        self._rows: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [rows, V], a tensor of this step alone that nobody writes to afterwards."""
        self._scores.append(scores)
        return scores

    def after(self, input_ids: Tensor, done: Tensor) -> None:
        """input_ids: [rows, length] with the new tokens; done: [rows] True where a row ends with its new token."""
        if self._going is None:
            self._going = torch.ones_like(done, dtype=torch.bool)
        self._tokens.append(input_ids[:, -1].clone())  # not to keep all before it
        self._sampled.append(self._going)
        self._going = self._going & ~done
        if sum(one.numel() for one in self._scores) >= HELD_LOGITS:
            self._work()

    def _work(self) -> None:
        if not self._tokens:
            return
        sampled = torch.cat(self._sampled)
        at = sampled.nonzero()[:, 0]
        scores, tokens = torch.cat(self._scores), torch.cat(self._tokens)
        scores = scores if len(at) == len(scores) else scores[at]
        self._parts.append(evidence(scores, tokens[at], self.sampling, self._recipe))
        self._rows.append(at % self._size)
        self._scores, self._tokens, self._sampled = [], [], []

    def rollouts(self) -> list[TokenEvidence]:
        """Of each row the evidence of its tokens, on the CPU."""
        self._work()
        whole, rows = TokenEvidence.cat(self._parts), torch.cat(self._rows).cpu()
        whole = replace(whole, **{name: getattr(whole, name).cpu() for name in TENSORS})
        order = rows.argsort(stable=True)
        bounds = torch.searchsorted(rows[order], torch.arange(self._size + 1))
        return [whole.rows(order[bounds[row] : bounds[row + 1]]) for row in range(self._size)]


def _watched(criteria: Any, steps: _Steps) -> Any:
    """The stopping criteria as they are; `steps` hears what they say."""

    class Watched(type(criteria)):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
            done = super().__call__(input_ids, scores, **more)
            steps.after(input_ids, done)
            return done

    return Watched(criteria)


def _check_mode(model: Any, config: GenerationConfig) -> None:
    mode = str(getattr(config.get_generation_mode(), "value", config.get_generation_mode()))
    if mode == "greedy_search":
        raise UsageError(
            "greedy decoding has no distribution to record", next_step="Give generate(..., do_sample=True)."
        )
    if mode != "sample":
        raise UsageError(
            f"generate is set to {mode.replace('_', ' ')}, whose tokens are not drawn from the model's distribution",
            next_step="Record plain sampling: do_sample=True, num_beams=1, without an assistant.",
        )
    if model.config.is_encoder_decoder:
        raise UsageError("an encoder-decoder model cannot be audited", next_step="Use a causal language model.")


def _check_prompt(input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """The prompt is there as token ids, from its beginning."""
    length, mask = input_ids.shape[1], model_kwargs.get("attention_mask")
    context = getattr(config, "_mask_length", length) if mask is None else mask.shape[1]
    if length == 0 or context != length or model_kwargs.get("inputs_embeds") is not None:
        raise UsageError(
            "the prompt is not known as token ids: it came as embeddings, or a part of it in past_key_values",
            next_step="Give generate all ids of the prompt as input_ids.",
        )


def _prompts(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Token ids without padding."""
    ids = input_ids.tolist()
    if mask is None:
        return ids
    return [
        [one for one, there in zip(row, m, strict=True) if there] for row, m in zip(ids, mask.tolist(), strict=True)
    ]


def _sampling(config: GenerationConfig) -> Sampling:
    """What is known to the schema of how the scores were made; they have it all behind them."""
    temperature, top_p, top_k = config.temperature, config.top_p, config.top_k
    return Sampling(
        temperature=1.0 if temperature is None else float(temperature),
        top_p=1.0 if top_p is None else float(top_p),
        top_k=int(top_k) or -1 if top_k else -1,
        logprobs_mode="processed",
    )


def _finish_reason(length: int, last: int, config: GenerationConfig) -> str | None:
    """length: with the padded prompt, as `max_length` counts."""
    stops = config.eos_token_id
    ended = last == stops if isinstance(stops, int) else last in (stops or ())
    if ended:
        return "stop"
    return "length" if length == config.max_length else None


def _groups(rows: int, per_prompt: int) -> list[str | None]:
    if per_prompt == 1:
        return [None] * rows
    names = [uuid.uuid4().hex for _ in range(rows // per_prompt)]
    return [names[row // per_prompt] for row in range(rows)]


def _synced(model: Any) -> bool:
    """Whether ranks wait for each other until all have ended: `generate` decides it, and does not say so here."""
    return bool(model._extract_generation_mode_kwargs(None, {}, None, None, None).get("synced_gpus", False))


def _listed(name: str, values: Any, rows: int) -> list[Any]:
    out = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(out) != rows:
        raise UsageError(
            f"{rows} rollouts wait to be finished, {name} has {len(out)} entries",
            next_step="Give one for each row of what generate returned, over all calls since the last finish().",
        )
    return out
