"""What SGLang answers to /generate.

    trm-audit convert --from sglang answers.jsonl -o rollouts/

Ask with `"return_logprob": true` and `"top_logprobs_num": 20`, and `"input_ids"` as the prompt, kept in the request
beside the answer; or with `"logprob_start_len": 0`, by which the answer has the ids of the prompt too.

There is no SGLang for a CPU at hand, so nothing here was checked on an answer. Read in its source (`sampler.py`,
`tokenizer_manager.py`, `logprob_ops.py` of 2026, and slime and miles, which read these answers):

- `meta_info.output_token_logprobs` has (log-probability, id, text or null) for each token, the one that ended the
  response included.
- Values follow the temperature and come before top-k, top-p and min-p: `tempered`. A server started with
  SGLANG_RETURN_ORIGINAL_LOGPROB=1 gives them from before the temperature, and the answer does not say so.
- `output_top_logprobs` has the `top_logprobs_num` most probable tokens, sorted; the sampled one is not added. A
  probability of 0 is the least number of its type.
- `weight_version` is that of the end of the response; later versions add `weight_versions`, spans of tokens.
- `routed_experts` is base64 of int32 numbers, for all tokens but the last, layers and k not told apart. Who knows k
  passes it to `rows_of`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trm_audit.adapters.answers import (
    DRIFT,
    Answer,
    Entry,
    evidence,
    group_of,
    is_plain,
    read_answers,
    sampling,
    token_ids,
    versions,
)
from trm_audit.adapters.base import Given, Row, Source
from trm_audit.adapters.vllm import experts_rows
from trm_audit.errors import BadInput

ASK = 'Ask with "return_logprob": true, "top_logprobs_num": 20 and "logprob_start_len": 0.'
SHAPING = {
    "min_p": (None, 0),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_new_tokens": (None, 0),
    "logit_bias": (None, {}),
    "regex": (None,),
    "json_schema": (None,),
    "ebnf": (None,),
    "structural_tag": (None,),
}
"""Sampling parameters besides temperature, top-p and top-k that shape the distribution, with what is off."""


def read(path: Path, given: Given) -> Iterator[Row]:
    """Rows of a file of answers: one for each, or for each sample of a list.

    Raises:
        BadInput: no log-probabilities, no ids of the prompt, or counts that do not fit each other.
    """
    return rows_of(read_answers(path), given)


def rows_of(answers: Iterable[Answer], given: Given, *, experts_per_token: int | None = None) -> Iterator[Row]:
    """Rows of answers.

    Args:
        answers: with their requests where there are any.
        given: what the user says; notes what is assumed.
        experts_per_token: k, by which `routed_experts` can be read; without it they are left out.
    """
    for answer in answers:
        samples = answer.body if isinstance(answer.body, list) else [answer.body]
        for sample in samples:
            if not isinstance(sample, dict) or not isinstance(sample.get("meta_info"), dict):
                raise BadInput("has no meta_info", place=answer.place, next_step=f"Is it {SOURCE.about}?")
        prompts = [_prompt(answer, samples, at) for at in range(len(samples))]
        for at in range(len(samples)):
            yield _row(answer, samples, prompts, at, given, experts_per_token)


def _row(
    answer: Answer,
    samples: Sequence[Mapping[str, Any]],
    prompts: Sequence[list[int]],
    at: int,
    given: Given,
    k: int | None,
) -> Row:
    place = f"{answer.place}, sample {at}" if len(samples) > 1 else answer.place
    meta, prompt, settings = samples[at]["meta_info"], prompts[at], answer.request.get("sampling_params") or {}
    if isinstance(settings, list):
        settings = settings[at] if len(settings) == len(samples) else {}
    response, own, tops = _response(samples[at], place)
    name = meta.get("id") or f"{answer.number}-{at}"
    spans = meta.get("weight_versions") or [
        {"version": str(meta.get("weight_version", "default")), "start": 0, "end": len(response)}
    ]
    reason = meta.get("finish_reason")
    row: Row = {
        "rollout_id": f"{answer.name}/{name}",
        "group_id": group_of(answer, answer.number, prompts, at, given),
        "prompt_ids": prompt,
        "response_ids": response,
        **evidence(own, tops),
        **sampling(settings, given, "SGLang"),
        "engine": "sglang",
        "finish_reason": reason.get("type") if isinstance(reason, dict) else reason,
        "policy_version": versions(spans, len(response), given),
        "routed_experts": _experts(meta.get("routed_experts"), len(prompt) + len(response), answer, k, given, place),
    }
    row["logprobs_mode"] = _stage(row, settings, given)
    return row | answer.columns(at, len(samples))


def _response(sample: Mapping[str, Any], place: str) -> tuple[list[int], list[Entry], list[list[Entry]] | None]:
    """Ids, sampled tokens and lists. The ids that stand with the log-probabilities are the ones."""
    meta = sample["meta_info"]
    found = meta.get("output_token_logprobs")
    ids = token_ids(sample.get("output_ids"), "output_ids", place)
    if found is None:
        raise BadInput("has no log-probabilities" if ids is not None else DRIFT, place=place, next_step=ASK)
    own = [_entry(item) for item in found]
    response = [entry.id for entry in own if entry.id is not None]
    counted = meta.get("completion_tokens", len(own))
    if len(response) != counted or (ids is not None and ids != response):
        raise BadInput(
            f"has log-probabilities of {len(response)} tokens, and {counted if ids is None else len(ids)} tokens",
            place=place,
            next_step="Is it a whole answer, and not a piece of a stream?",
        )
    tops = meta.get("output_top_logprobs")
    if not tops or not all(tops):
        return response, own, None
    if len(tops) != len(own):
        raise BadInput(f"has {len(tops)} lists of top log-probabilities for {len(own)} tokens", place=place)
    return response, own, [[_entry(item) for item in top] for top in tops]


def _entry(item: Sequence[Any]) -> Entry:
    return Entry(int(item[1]), item[0])


def _prompt(answer: Answer, samples: Sequence[Mapping[str, Any]], at: int) -> list[int]:
    """Ids of the prompt: those that log-probabilities are of, if they are of all of it, or what was sent as ids."""
    meta = samples[at]["meta_info"]
    counted = meta.get("prompt_tokens")
    known = [int(item[1]) for item in meta.get("input_token_logprobs") or []]
    sent = answer.request.get("input_ids") or []
    if sent and isinstance(sent[0], list):
        sent = sent[at] if len(sent) == len(samples) else []
    for ids in (known, sent):
        if ids and (counted is None or len(ids) == counted) and all(type(one) is int for one in ids):
            return list(ids)
    raise BadInput(
        f"has no token ids of the prompt ({len(known or sent)} of {counted or 'an unknown number of'} tokens)",
        place=answer.place,
        next_step=f'{ASK} Or send "input_ids" and keep the request beside the answer.',
    )


def _stage(row: Row, settings: Mapping[str, Any], given: Given) -> str:
    """`tempered`, unless the user says otherwise; says what was taken for granted."""
    for name, off in SHAPING.items():
        if settings.get(name) not in off:
            given.assume(f"{name} shaped what was sampled in some rollouts; score does not know of it.")
    if given.logprobs_mode is None and not is_plain(row):
        given.assume(
            "Log-probabilities follow the temperature, as SGLang's do: --logprobs-mode raw, if the server ran with "
            "SGLANG_RETURN_ORIGINAL_LOGPROB=1."
        )
    return given.logprobs_mode or "tempered"


def _experts(data: Any, tokens: int, answer: Answer, k: int | None, given: Given, place: str) -> list[Any] | None:
    """Experts as the schema has them, if k is known, by which layers can be told apart."""
    if data is None:
        return None
    if k is None:
        given.assume("routed_experts are left out: SGLang does not say of how many layers they are (rows_of takes k).")
        return None
    skipped = int(answer.request.get("routed_experts_start_len") or 0)
    array = np.frombuffer(base64.b64decode(data), dtype="<i4")
    if array.size % (k * max(1, tokens - 1 - skipped)):
        raise BadInput(
            f"routed_experts has {array.size} numbers, no multiple of {k} for {tokens - 1 - skipped} tokens",
            place=place,
        )
    return experts_rows(array.reshape(tokens - 1 - skipped, -1, k), tokens, skipped, place)


SOURCE = Source(
    name="sglang",
    about="answers of SGLang to /generate, in JSON Lines (best with the requests) or JSON",
    suffixes=(".jsonl", ".json"),
    grade="interval",
    switch_on='In each request `"return_logprob": true`, `"top_logprobs_num": 20` and `"logprob_start_len": 0`.',
    read=read,
)
