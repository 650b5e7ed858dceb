"""Answers of inference servers in files, and what the adapters of engines have in common.

A file holds one JSON object a line (or one for the whole file, or an array): an answer as the server gave it, or
`{"request": ..., "response": ...}` with what it was asked. The pair is better: answers do not repeat the sampling
settings. Beside the two keys a line may say `reward`, `advantage`, `group_id`, `rollout_id` or `policy_version`: one
value for all samples of the answer, or a list with one for each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trm_audit.adapters.base import Given, Row
from trm_audit.errors import BadInput

FILLER = -9000.0
"""Below it nothing was measured: vLLM's server writes -9999.0 for -inf, SGLang the least float32."""
BESIDE = ("reward", "advantage", "group_id", "rollout_id", "policy_version")
OFF: dict[str, float | int] = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
DRIFT = (
    "has text and no token ids; tokenizing the text again does not give back the tokens that were sampled "
    "(retokenisation drift)"
)


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        place: where it stands, for messages.
        name: the file's stem, for ids of rollouts.
        number: of the answer in its file, from 1.
        body: parsed JSON.
        request: what was asked; empty if the file does not say.
        beside: columns that stand beside the two.
    """

    place: str
    name: str
    number: int
    body: Any
    request: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)

    def columns(self, at: int, count: int) -> Row:
        """What stands beside, for sample `at` of `count`.

        Raises:
            BadInput: a list has another length, or all samples would have one rollout_id.
        """
        out = {name: _share(value, at, count, f"{self.place}, {name}") for name, value in self.beside.items()}
        if count > 1 and "rollout_id" in out and not isinstance(self.beside["rollout_id"], list):
            raise BadInput(f"one rollout_id for {count} samples", place=self.place, next_step="Give a list of them.")
        return out


class Entry(NamedTuple):
    """A token at a position: id (None where only its text is known), log-probability, rank if the engine says it."""

    id: int | None
    logprob: float | None
    rank: int | None = None


def read_answers(path: Path) -> Iterator[Answer]:
    """Answers of a file, in its order.

    Raises:
        BadInput: a line is no JSON object, or an error that the server answered with.
    """
    for number, (place, value) in enumerate(_values(path), start=1):
        pair = isinstance(value, dict) and "response" in value
        body = value["response"] if pair else value
        request = (value.get("request") or {}) if pair else {}
        if not isinstance(body, dict | list) or not isinstance(request, dict):
            raise BadInput("is no answer of a server", place=place, next_step="One JSON object for each answer.")
        if isinstance(body, dict) and (body.get("error") or body.get("object") == "error"):
            said = json.dumps(body.get("error") or body.get("message"))[:200]
            raise BadInput(f"the server answered with an error: {said}", place=place, next_step="Drop that line.")
        beside = {name: value[name] for name in BESIDE if pair and value.get(name) is not None}
        yield Answer(place, path.stem, number, body, request, beside)


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """JSON values of a file with their places: one a line, or those of the one that fills the file."""
    if path.suffix == ".json":
        try:
            whole = json.loads(path.read_bytes())
        except ValueError:  # one a line, in spite of the name
            whole = None
        if whole is not None:
            many = whole if isinstance(whole, list) else [whole]
            yield from ((f"{path}, answer {at}" if len(many) > 1 else str(path), v) for at, v in enumerate(many, 1))
            return
    with path.open("rb") as lines:
        for at, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}, line {at}", parsed(line, f"{path}, line {at}")


def parsed(text: bytes | str, place: str) -> Any:
    """JSON of a line. Raises BadInput."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadInput(f"is no JSON: {error}", place=place, next_step="One JSON object a line.") from error


def _share(value: Any, at: int, count: int, place: str) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise BadInput(f"has {len(value)} values for {count} samples", place=place, next_step="One for each, or one.")
    return value[at]


def sampling(settings: Mapping[str, Any], given: Given, engine: str) -> Row:
    """Temperature, top-p and top-k of a rollout: as asked, else as the user says, else off, and that is said.

    Args:
        settings: what was asked.
        given: what the user says; notes what is assumed.
        engine: for the sentence.
    """
    named = {name: settings[name] for name in OFF if settings.get(name) is not None}
    out: Row = OFF | given.sampling() | named
    if missing := [name for name in OFF if name not in named and getattr(given, name) is None]:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        values = ", ".join(f"{name} {OFF[name]:g}" for name in missing)
        given.assume(
            f"{values} where a request does not say. {engine} may take them from the model's generation_config.json "
            f"instead; what they were can be given with {flags}."
        )
    return {name: out[name] for name in OFF}


def is_plain(row: Row) -> bool:
    """Whether raw and processed values are the same: nothing tempers or truncates."""
    return bool(row["temperature"] == 1 and row["top_p"] == 1 and row["top_k"] in (-1, 0))


def token_ids(values: Any, what: str, place: str) -> list[int] | None:
    """A list of token ids, None for null. Raises BadInput for anything else."""
    if values is None:
        return None
    if isinstance(values, list) and all(type(value) is int for value in values):
        return values
    raise BadInput(f"{what} is no list of token ids", place=place, next_step="Is --from right?")


def group_of(answer: Answer, name: object, prompts: Sequence[Sequence[int]], at: int, given: Given) -> str:
    """Group of sample `at`: the samples of its prompt in the answer, or in the file if it is the only one there.

    Args:
        answer: whose samples these are.
        name: of the request.
        prompts: of all samples of the answer.
        at: which one.
        given: notes what is assumed.
    """
    prompt = blake2b(np.asarray(prompts[at], dtype="<i4").tobytes(), digest_size=8).hexdigest()
    same = [*prompts].count(prompts[at])
    if same == 1:
        given.assume(
            "Samples of requests for a single one share a group_id where, in one file, their prompts are equal."
        )
        return f"{answer.name}/{prompt}"
    return f"{answer.name}/{name}" if same == len(prompts) else f"{answer.name}/{name}/{prompt}"


def measured(value: object) -> bool:
    """Whether a value is a log-probability and no placeholder."""
    return isinstance(value, int | float) and math.isfinite(value) and value > FILLER


def evidence(sampled: Sequence[Entry], tops: Sequence[Sequence[Entry]] | None) -> Row:
    """Columns of what is known at each position; null where a value is missing at any.

    Args:
        sampled: per position, the token that was sampled.
        tops: per position the K most probable tokens in any order, exactly K, already without what is not among them.
    """
    logprobs = [entry.logprob for entry in sampled]
    complete = all(measured(value) for value in logprobs)
    row: Row = {
        "rollout_logprobs": logprobs if complete else None,
        "rollout_topk_ids": None,
        "rollout_topk_logprobs": None,
    }
    if complete and tops is not None:
        known = [[entry for entry in top if entry.logprob is not None and entry.logprob > FILLER] for top in tops]
        if all(known) and all(entry.id is not None for top in known for entry in top):
            ordered = [sorted(top, key=lambda entry: -(entry.logprob or 0.0)) for top in known]
            row["rollout_topk_ids"] = [[entry.id for entry in top] for top in ordered]
            row["rollout_topk_logprobs"] = [[entry.logprob for entry in top] for top in ordered]
    return row


def without_added(sampled: Entry, entries: Iterable[Entry]) -> list[Entry]:
    """The most probable tokens, from a list into which an engine put the sampled one whether it belongs there or not.

    The others are the n most probable tokens besides it. So it belongs there if its rank is at most n + 1, or if it is
    no less probable than the last of them; otherwise that cannot be shown, and it is left out.
    """
    others = [entry for entry in entries if entry.id != sampled.id]
    values = [entry.logprob for entry in others if entry.logprob is not None]
    ranked = sampled.rank is not None and sampled.rank <= len(others) + 1
    above = sampled.logprob is not None and bool(values) and sampled.logprob >= min(values)
    return [*others, sampled] if ranked or above else others


def versions(spans: Sequence[Mapping[str, Any]] | None, tokens: int, given: Given) -> list[int] | None:
    """A policy version for each token, from spans `{version, start, end}`; None where versions are no integers."""
    if not spans:
        return None
    out = [-1] * tokens
    for span in spans:
        try:
            number = int(span["version"])
        except ValueError:
            if span["version"] != "default":
                given.assume("Versions of weights that are no integers are left out; policy_version takes integers.")
            return None
        out[span["start"] : span["end"]] = [number] * (span["end"] - span["start"])
    return out if len(out) == tokens and -1 not in out else None
