"""What llama.cpp's own server answers to /completion.

    trm-audit convert --from llama-cpp answers.jsonl -o rollouts/

Ask with `"prompt"` as token ids (/tokenize gives them), `"n_probs": 20` and `"return_tokens": true`, and keep the
request beside the answer: the server does not repeat the ids of a prompt. /v1/completions with such a prompt is read
too. A chat is not, because its prompt is known as messages only.

What is true of these answers, checked on a server of October 2026 (xllamacpp 2026.10):

- `logprob` is raw, before temperature and truncation; with `"post_sampling_probs": true` there is `prob` instead, a
  probability after all samplers.
- `samplers` says what was applied. Settings stand in the answer whether applied or not.
- A list has the most probable tokens, sorted; the sampled one is not added.
- A token that ends inside a character has no entry, nor has a matched stop string. So there can be fewer entries than
  tokens, and the i-th is not that of token i: they are matched by id. Such a row has tokens of unknown probability and
  is of no grade.

llama-cpp-python answers with text only: its rollouts are recorded by `trm_audit.record.llama_cpp`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trm_audit.adapters.answers import DRIFT, OFF, Answer, Entry, evidence, group_of, read_answers, sampling, token_ids
from trm_audit.adapters.base import Given, Row, Source
from trm_audit.errors import BadInput, RowError

ASK = (
    'Ask /completion with "prompt" as token ids, "n_probs": 20, "return_tokens": true, and keep the request beside the '
    "answer; with llama-cpp-python sample through trm_audit.record.llama_cpp.LlamaRecorder."
)
SHAPING: dict[str, tuple[str, float]] = {
    "min_p": ("min_p", 0),
    "typical_p": ("typ_p", 1),
    "top_n_sigma": ("top_n_sigma", -1),
    "xtc_probability": ("xtc", 0),
    "dry_multiplier": ("dry", 0),
    "repeat_penalty": ("penalties", 1),
    "presence_penalty": ("penalties", 0),
    "frequency_penalty": ("penalties", 0),
    "dynatemp_range": ("temperature", 0),
}
"""Settings besides temperature, top-p and top-k -> the sampler that applies them, and the value that is off."""
ENDS = {"eos": "stop", "word": "stop", "limit": "length"}


def read(path: Path, given: Given) -> Iterator[Row | RowError]:
    """Rows of a file of answers, one for each; an error where tokens have no log-probability.

    Raises:
        BadInput: no token ids, no log-probabilities, or ids that do not fit each other.
    """
    for answer in read_answers(path):
        body = answer.body
        if not isinstance(body, dict) or not ({"completion_probabilities", "choices", "content"} & set(body)):
            raise BadInput("is no answer to /completion", place=answer.place, next_step=ASK)
        yield _row(answer, given)


def _row(answer: Answer, given: Given) -> Row | RowError:
    response, entries, finish = _native(answer) if "choices" not in answer.body else _openai(answer)
    prompt = _prompt(answer)
    known = _matched(response, entries, answer.place)
    row: Row = {
        "rollout_id": f"{answer.name}/{answer.number}",
        "group_id": group_of(answer, answer.number, [prompt], 0, given),
        "prompt_ids": prompt,
        "response_ids": response,
        **evidence(*_evidence(response, known)),
        **_sampling(answer, given),
        "engine": "llama.cpp",
        "finish_reason": finish,
    }
    if None in known:
        return RowError(
            f"{known.count(None)} of {len(known)} tokens have no log-probability, token {known.index(None)} first",
            place=answer.place,
            next_step="llama.cpp gives none to tokens that end inside a character, nor to a stop string: record with "
            "trm_audit.record.llama_cpp, or leave such answers out (--skip-bad).",
        )
    row["logprobs_mode"] = "processed" if any("prob" in item for item in entries) else "raw"
    return row | answer.columns(0, 1)


def _prompt(answer: Answer) -> list[int]:
    """Ids of the prompt, from the request."""
    sent = answer.request.get("prompt")
    if not isinstance(sent, list) or not sent or not all(type(one) is int for one in sent):
        raise BadInput("has no token ids of the prompt", place=answer.place, next_step=ASK)
    read_by_server = answer.body.get("tokens_evaluated", len(sent))
    if answer.body.get("truncated") or read_by_server != len(sent):
        raise BadInput(
            f"was sampled after {read_by_server} tokens, the request has {len(sent)}",
            place=answer.place,
            next_step="The server cut or shifted the context: what it sampled from is not known; give it a larger one.",
        )
    return list(sent)


def _native(answer: Answer) -> tuple[list[int], list[Mapping[str, Any]], str | None]:
    """Response, entries and why it ended, of /completion."""
    body = answer.body
    entries: list[Mapping[str, Any]] = body.get("completion_probabilities") or []
    response = token_ids(body.get("tokens"), "tokens", answer.place) or [int(item["id"]) for item in entries]
    if len(response) != body.get("tokens_predicted", len(response)):
        raise BadInput(
            f"has ids of {len(response)} of {body['tokens_predicted']} tokens: {DRIFT}",
            place=answer.place,
            next_step='Ask with "return_tokens": true.',
        )
    if response and not entries:
        raise BadInput("has no log-probabilities", place=answer.place, next_step='Ask with "n_probs": 20.')
    return response, entries, ENDS.get(body.get("stop_type"), body.get("stop_type"))


def _openai(answer: Answer) -> tuple[list[int], list[Mapping[str, Any]], str | None]:
    """The same of /v1/completions. Its entries are all that says which tokens were sampled."""
    choice, *others = answer.body["choices"]
    if others:
        raise BadInput("has several choices", place=answer.place, next_step="Send one request for each sample.")
    entries = (choice.get("logprobs") or {}).get("content")
    if not isinstance(entries, list) or any("id" not in item for item in entries):
        raise BadInput(DRIFT, place=answer.place, next_step=ASK)
    said = (answer.body.get("usage") or {}).get("completion_tokens", len(entries))
    if said != len(entries):
        raise BadInput(f"has ids of {len(entries)} of {said} tokens: {DRIFT}", place=answer.place, next_step=ASK)
    return [int(item["id"]) for item in entries], entries, choice.get("finish_reason")


def _matched(
    response: Sequence[int], entries: Sequence[Mapping[str, Any]], place: str
) -> list[Mapping[str, Any] | None]:
    """The entry of each token, None where there is none. Entries keep the order of the tokens.

    Where an id occurs twice it may not be clear which of the two has the entry; the row is of no grade either way.
    """
    out: list[Mapping[str, Any] | None] = []
    left = iter(entries)
    upcoming = next(left, None)
    for token in response:
        fits = upcoming is not None and upcoming["id"] == token
        out.append(upcoming if fits else None)
        upcoming = next(left, None) if fits else upcoming
    if upcoming is not None:
        raise BadInput(
            f"completion_probabilities is of token {upcoming['id']}, which is not among the tokens there",
            place=place,
            next_step="Is it one answer, and whole?",
        )
    return out


def _evidence(
    response: Sequence[int], known: Sequence[Mapping[str, Any] | None]
) -> tuple[list[Entry], list[list[Entry]] | None]:
    sampled = [
        Entry(token, None if item is None else _logprob(item)) for token, item in zip(response, known, strict=True)
    ]
    tops = [(item or {}).get("top_logprobs") or (item or {}).get("top_probs") or [] for item in known]
    return sampled, [[Entry(int(one["id"]), _logprob(one)) for one in top] for top in tops] if all(tops) else None


def _logprob(item: Mapping[str, Any]) -> float:
    """Log-probability of an entry, which may say a probability."""
    if "prob" in item:
        return math.log(item["prob"]) if item["prob"] > 0 else -math.inf
    return float(item["logprob"])


def _sampling(answer: Answer, given: Given) -> Row:
    """What the samplers that ran did to the distribution; says what else shaped it."""
    settings = answer.body.get("generation_settings") or answer.request
    samplers = settings.get("samplers")
    if not isinstance(samplers, list):
        return sampling(settings, given, "llama.cpp")
    applied = {name: settings[name] for name in OFF if name in samplers and name in settings}
    shaping = [
        name for name, (sampler, off) in SHAPING.items() if sampler in samplers and settings.get(name, off) != off
    ]
    shaping += [name for name in ("mirostat", "logit_bias", "grammar") if settings.get(name)]
    for name in shaping:
        given.assume(f"{name} shaped what was sampled in some rollouts; score does not know of it.")
    return {**OFF, **applied}


SOURCE = Source(
    name="llama-cpp",
    about="answers of llama.cpp's server to /completion with their requests, in JSON Lines",
    suffixes=(".jsonl", ".json"),
    grade="interval",
    switch_on='In each request `"prompt"` as token ids, `"n_probs": 20` and `"return_tokens": true`.',
    read=read,
)
