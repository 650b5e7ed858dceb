"""What a request of vLLM says of itself: its `SamplingParams`, and what of them a recorder needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trm_audit.record.running import Request
from trm_audit.rollout import Sampling

GREEDY = 1e-5
"""Temperatures below it are greedy decoding to vLLM."""
NAMED = ("rollout_id", "group_id", "policy_version")
SHAPING: dict[str, tuple[object, ...]] = {
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "logit_bias": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "structured_outputs": (),
    "guided_decoding": (),
}
"""Settings besides temperature, top-p and top-k that shape the distribution, with what is off besides None."""
OVERRIDING = ("thinking_token_budget", "trace_decode_token_ids")
"""Settings that put tokens in the place of sampled ones."""


def check(params: Any) -> None:
    """Refuses a request that cannot be recorded as it is.

    Raises:
        ValueError: what vLLM answers a request with.
    """
    named = params.extra_args or {}
    if (reason := overriding(params)) and wanted(params):
        raise ValueError(f"{reason} Drop it, or leave the request out with extra_args={{'record': False}}.")
    if not isinstance(named.get("policy_version", 0), int):
        raise ValueError(f"policy_version is {named['policy_version']!r}, an integer is needed.")
    if not -(2**63) <= (named.get("policy_version") or 0) < 2**63:
        raise ValueError(f"policy_version is {named['policy_version']}, which 64 bits do not hold.")
    for name in ("rollout_id", "group_id"):
        try:
            str(named.get(name, "")).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} is {named[name]!a}, which is no Unicode text.") from None
    if named.get("rollout_id") is not None and params.n > 1:
        raise ValueError(
            f"rollout_id {named['rollout_id']!r} would name {params.n} rollouts (n > 1). Give group_id and no "
            "rollout_id, or send one request for each rollout."
        )


def request_of(params: Any, prompt_len: int, stage: str, longest: int) -> Request:
    """What is recorded of a request.

    Args:
        params: its SamplingParams, as they reach a worker.
        prompt_len: tokens of the prompt.
        stage: of the logits that the recorder is shown, as `Sampling.logprobs_mode` has it.
        longest: tokens of prompt and response at most.
    """
    named = params.extra_args or {}
    columns = {name: named[name] for name in NAMED if named.get(name) is not None}
    on = _shaping(params)
    if on:
        columns["logits_processors"] = ", ".join(_named(on))
    room = longest - prompt_len
    return Request(
        prompt_len=prompt_len,
        sampling=_sampling(params, stage),
        stops=_stops(params),
        limit=room if params.max_tokens is None else min(params.max_tokens, room),
        min_p=float(params.min_p) if stage == "raw" else 0.0,
        shaping=on,
        columns=columns,
    )


def wanted(params: Any) -> bool:
    """Whether a request is to be recorded."""
    return (params.extra_args or {}).get("record", True) is not False


def overriding(params: Any) -> str:
    """Why a request cannot be recorded; empty if it can."""
    names = [name for name in OVERRIDING if getattr(params, name, None) is not None]
    return f"{names[0]} puts tokens in place of sampled ones, which cannot be recorded." if names else ""


def _shaping(params: Any) -> dict[str, object]:
    found = {name: getattr(params, name, None) for name in SHAPING}
    return {name: value for name, value in found.items() if value is not None and value not in SHAPING[name]}


def _named(on: Mapping[str, object]) -> list[str]:
    return [f"{name}={value:g}" if isinstance(value, int | float) else name for name, value in on.items()]


def _sampling(params: Any, stage: str) -> Sampling:
    top_k = int(params.top_k or -1)
    return Sampling(float(params.temperature), float(params.top_p), top_k if top_k > 0 else -1, stage)


def _stops(params: Any) -> frozenset[int]:
    """Token ids that end a response. `all_stop_token_ids` has the end-of-sequence tokens even if they are ignored."""
    every = () if params.ignore_eos else getattr(params, "all_stop_token_ids", ())
    return frozenset([*(params.stop_token_ids or ()), *every])


def unrecorded(params: Any) -> str:
    """Why a request is not recorded though nobody asked for that; empty if it is."""
    greedy = "Greedy requests are not recorded: they have no distribution."
    return overriding(params) or (greedy if params.temperature < GREEDY else "")
