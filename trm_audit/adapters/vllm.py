"""What vLLM's server answers: chats, completions, `/inference/v1/generate`, and streams of server-sent events.

    trm-audit convert --from vllm --logprobs-mode raw answers.jsonl -o rollouts/

Ask with `"return_token_ids": true`, `"logprobs"`, and for top-K evidence with `"return_tokens_as_token_ids": true`:
without it the other tokens of a list are named by their text, which does not say which tokens they are (in
completions, tokens of equal text even share one entry). `/inference/v1/generate` names them by id anyway.

What is true of these answers, checked on answers of vLLM 0.32 against a forward of the same weights:

- Entry t belongs to token t, the end-of-sequence token included.
- The first entry of a list is the sampled token, the others follow by rank. In chats and `generate` the list is then
  cut to the k that were asked for, so that a sampled token from outside has pushed the k-th out.
- An answer does not say at which stage its values were taken. `--logprobs-mode` of the server decides: raw values
  (the default) are before temperature and truncation, processed ones after both.
- -9999.0 stands for -inf, in lists of processed values.

Read in vLLM's source only: `routed_experts` (base64 of an .npy file, rows for all tokens but the last),
`routed_experts_prompt_start`, `weight_versions` of several versions. For answers in Python see `vllm_outputs`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trm_audit.adapters.answers import (
    DRIFT,
    FILLER,
    Answer,
    Entry,
    evidence,
    group_of,
    is_plain,
    parsed,
    read_answers,
    sampling,
    token_ids,
    versions,
    without_added,
)
from trm_audit.adapters.base import Given, Row, Source
from trm_audit.errors import BadInput

BY_ID = "token_id:"
ASK = 'Ask with "return_token_ids": true, or generate through trm_audit.record.vllm.'
SHAPING: dict[str, tuple[object, ...]] = {
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "structured_outputs": (),
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "thinking_token_budget": (),
}
"""Settings besides temperature, top-p and top-k that shape the distribution, with what is off besides null."""


def read(path: Path, given: Given) -> Iterator[Row]:
    """Rows of a file of answers, one for each choice.

    Raises:
        BadInput: no token ids, no log-probabilities, or their stage is not known and makes a difference.
    """
    for answer in read_stream(path) if path.suffix == ".sse" else read_answers(path):
        choices = answer.body.get("choices") if isinstance(answer.body, dict) else None
        if not isinstance(choices, list):
            raise BadInput("has no choices", place=answer.place, next_step=f"Is it {SOURCE.about}?")
        prompts = [_prompt(answer, choice) for choice in choices]
        for at in range(len(choices)):
            yield _row(answer, choices, prompts, at, given)


def _row(
    answer: Answer, choices: Sequence[Mapping[str, Any]], prompts: Sequence[list[int]], at: int, given: Given
) -> Row:
    choice, prompt, place = choices[at], prompts[at], f"{answer.place}, choice {at}"
    body, settings = answer.body, answer.request.get("sampling_params") or answer.request
    sampled, tops = _positions(choice, place)
    response = token_ids(choice.get("token_ids"), "token_ids", place)
    if response is None:
        response = [entry.id for entry in sampled if entry.id is not None]
        if not sampled or len(response) < len(sampled):
            raise BadInput(DRIFT, place=place, next_step=ASK)
    if len(sampled) != len(response):
        raise BadInput(
            f"has {len(response)} tokens and {len(sampled)} log-probabilities",
            place=place,
            next_step='Ask with "logprobs" (in chats true, with "top_logprobs"), and without "echo".',
        )
    sampled = [entry._replace(id=id) for entry, id in zip(sampled, response, strict=True)]
    name = body.get("id") or body.get("request_id") or answer.number
    row: Row = {
        "rollout_id": f"{answer.name}/{name}/{choice.get('index', at)}",
        "group_id": group_of(answer, name, prompts, at, given),
        "prompt_ids": prompt,
        "response_ids": response,
        **evidence(sampled, top_lists(sampled, tops, settings, given)),
        **sampling(settings, given, "vLLM"),
        "engine": "vllm",
        "finish_reason": choice.get("finish_reason"),
        "policy_version": versions(choice.get("weight_versions"), len(response), given),
        "routed_experts": _experts(choice.get("routed_experts"), len(prompt) + len(response), settings, place),
    }
    fillers = any(entry.logprob is not None and entry.logprob <= FILLER for top in tops for entry in top)
    row["logprobs_mode"] = stage(row, shaped(settings, given), fillers, given, place)
    return row | answer.columns(at, len(choices))


def _positions(choice: Mapping[str, Any], place: str) -> tuple[list[Entry], list[list[Entry]]]:
    """Sampled tokens, and lists of alternatives, from any of the three shapes."""
    found = choice.get("logprobs") or {}
    if isinstance(found.get("content"), list):
        return [_entry(item) for item in found["content"]], [
            [_entry(item) for item in item.get("top_logprobs") or []] for item in found["content"]
        ]
    if "token_logprobs" not in found and choice.get("token_ids"):
        raise BadInput("has no log-probabilities", place=place, next_step='Ask with "logprobs".')
    values = found.get("token_logprobs") or []
    sampled = [Entry(_named(token), value) for token, value in zip(found.get("tokens") or [], values, strict=True)]
    tops = found.get("top_logprobs") or [None] * len(sampled)
    return sampled, [[Entry(_named(token), value) for token, value in (top or {}).items()] for top in tops]


def _entry(item: Mapping[str, Any]) -> Entry:
    number = item.get("token_id")
    return Entry(_named(str(item.get("token"))) if number is None else number, item.get("logprob"), item.get("rank"))


def _named(token: str) -> int | None:
    """The id in "token_id:123"; None for a token's text."""
    digits = token.removeprefix(BY_ID)
    return int(digits) if digits != token and digits.isdecimal() else None


def top_lists(
    sampled: Sequence[Entry], tops: Sequence[Sequence[Entry]], settings: Mapping[str, Any], given: Given
) -> list[list[Entry]] | None:
    """Per position the most probable tokens; None where lists were not asked for, or cannot be read."""
    if not all(tops) or settings.get("logprob_token_ids"):  # these list what was asked for, not the most probable
        return None
    if any(entry.id is None for top in tops for entry in top):
        given.assume(
            'Lists of top_logprobs name tokens by their text and are left out: "return_tokens_as_token_ids": true '
            "makes rows with them grade interval."
        )
        return None
    return [without_added(own, top) for own, top in zip(sampled, tops, strict=True)]


def _prompt(answer: Answer, choice: Mapping[str, Any]) -> list[int]:
    """Ids of the prompt: a chat has them at the top, a completion in each choice; else what was sent as ids."""
    for holder in (answer.body, choice):
        if (ids := token_ids(holder.get("prompt_token_ids"), "prompt_token_ids", answer.place)) is not None:
            return ids
    for name in ("token_ids", "prompt"):
        sent = answer.request.get(name)
        if isinstance(sent, list) and sent and all(type(one) is int for one in sent):
            return list(sent)
    text_only = choice.get("token_ids") is None and BY_ID not in str(choice.get("logprobs"))[:1000]
    cause = DRIFT if text_only else "has no token ids of the prompt"
    raise BadInput(cause, place=answer.place, next_step=ASK)


def shaped(settings: Mapping[str, Any], given: Given) -> bool:
    """Whether anything besides temperature, top-p and top-k shaped what was sampled; says what."""
    found = {name: settings.get(name) for name in SHAPING}
    names = [name for name, value in found.items() if value is not None and value not in SHAPING[name]]
    for name in names:
        given.assume(f"{name} shaped what was sampled in some rollouts; score does not know of it.")
    return bool(names)


def stage(row: Row, is_shaped: bool, fillers: bool, given: Given, place: str) -> str:
    """The stage of the values, as the user says, or any where all are the same.

    Raises:
        BadInput: nobody says it, or what is there contradicts the user.
    """
    plain = is_plain(row) and not is_shaped
    hint = " It has tokens of probability 0 (-inf, or -9999.0), which only processed values have." if fillers else ""
    if given.logprobs_mode is None and not plain:
        settings = ", ".join(f"{name} {row[name]:g}" for name in ("temperature", "top_p", "top_k"))
        raise BadInput(
            f"does not say whether its log-probabilities are raw or processed, which differ ({settings}).{hint}",
            place=place,
            next_step="--logprobs-mode raw is vLLM's default; processed, if the server was started with "
            "--logprobs-mode processed_logprobs.",
        )
    if fillers and given.logprobs_mode == "raw":
        raise BadInput(f"cannot be raw.{hint}", place=place, next_step="Give --logprobs-mode processed.")
    if fillers and plain:
        raise BadInput(
            f"was truncated, and nothing says how.{hint}", place=place, next_step="Give --top-p, --top-k or requests."
        )
    return given.logprobs_mode or "raw"


def _experts(text: str | None, tokens: int, settings: Mapping[str, Any], place: str) -> list[Any] | None:
    """Rows of experts for all tokens but the last, -1 for those of the prompt that were not asked for."""
    if text is None:
        return None
    try:
        array = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except ValueError as error:
        raise BadInput(f"routed_experts cannot be read: {error}", place=place) from error
    return experts_rows(array, tokens, int(settings.get("routed_experts_prompt_start") or 0), place)


def experts_rows(array: np.ndarray[Any, Any], tokens: int, skipped: int, place: str) -> list[Any]:
    """Experts [rows, layers, k] as the schema has them, with -1 for `skipped` tokens of the prompt.

    Raises:
        BadInput: not one row for each token, or for each but the last.
    """
    if array.ndim != 3 or not tokens - 1 <= len(array) + skipped <= tokens:
        raise BadInput(
            f"routed_experts is of shape {array.shape}, rows for {tokens - 1 - skipped} tokens are needed", place=place
        )
    unknown = np.full((skipped, *array.shape[1:]), -1, dtype=np.int64)
    rows: list[Any] = np.concatenate([unknown, array.astype(np.int64)]).tolist()
    return rows


def read_stream(path: Path) -> Iterator[Answer]:
    """Answers put together from the server-sent events of one or more streams."""
    parts: dict[str, list[dict[str, Any]]] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            event = parsed(data, f"{path}, line {number}")
            if not isinstance(event, dict) or "choices" not in event:
                raise BadInput("is no piece of an answer", place=f"{path}, line {number}")
            parts.setdefault(str(event.get("id") or event.get("request_id")), []).append(event)
    for number, (name, events) in enumerate(parts.items(), start=1):
        yield Answer(f"{path}, stream {name}", path.stem, number, _joined(name, events))


def _joined(name: str, events: Sequence[Mapping[str, Any]]) -> Row:
    """One answer with the lists of its pieces joined, choice by choice."""
    choices: dict[int, Row] = {}
    body: Row = {"id": name}
    for event in events:
        if event.get("prompt_token_ids") is not None:
            body["prompt_token_ids"] = event["prompt_token_ids"]
        for piece in event["choices"]:
            choice = choices.setdefault(piece["index"], {"index": piece["index"], "logprobs": {}})
            for key in ("prompt_token_ids", "finish_reason", "weight_versions", "routed_experts"):
                if piece.get(key) is not None:
                    choice[key] = piece[key]
            if piece.get("token_ids") is not None:
                choice.setdefault("token_ids", []).extend(piece["token_ids"])
            for key, values in (piece.get("logprobs") or {}).items():
                choice["logprobs"].setdefault(key, []).extend(values or [])
    return body | {"choices": [choices[index] for index in sorted(choices)]}


SOURCE = Source(
    name="vllm",
    about="answers of vLLM's server, in JSON Lines (best with the requests), JSON, or server-sent events",
    suffixes=(".jsonl", ".json", ".sse"),
    grade="interval",
    switch_on='In each request `"logprobs"`, `"return_token_ids": true` and `"return_tokens_as_token_ids": true`; '
    "`convert --logprobs-mode` says what the server's `--logprobs-mode` was.",
    read=read,
)
