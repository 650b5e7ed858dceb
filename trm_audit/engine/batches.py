"""Padded batches, each perhaps continuing the key-value cache of an earlier one: forks and pieces of long sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from trm_audit.engine.plan import Step
from trm_audit.numerics.ragged import Ints


def run_batches(
    decoder: Callable[..., Any], steps: Sequence[Step], rows: Sequence[Ints], device: torch.device
) -> Iterator[Tensor]:
    """Hidden states of each step, [rows x width, H]; what lies behind the end of a shorter row means nothing.

    Sequences are padded on the right, where a causal model never looks, so no mask is needed.

    Args:
        decoder: takes input_ids, position_ids, past_key_values and use_cache; returns last_hidden_state.
        steps: from `plan.padded_steps` or `plan.fork_steps`, run in this order.
        rows: token ids of each sequence.
    """
    caches: dict[int, tuple[Any, int]] = {}  # step -> its cache, and how many steps still continue it
    for number, step in enumerate(steps):
        known: dict[str, Any] = {"use_cache": step.uses > 0 or step.after >= 0}
        if step.after >= 0:
            known["past_key_values"] = _taken(caches, step)
            first = step.segments[0].start
            known["position_ids"] = torch.arange(first, first + step.width, device=device).expand(step.rows, -1)
        with torch.inference_mode():
            out = decoder(input_ids=_padded(step, rows).to(device), **known)
        if step.uses:
            caches[number] = (out.past_key_values, step.uses)
        hidden: Tensor = out.last_hidden_state
        yield hidden.flatten(0, 1)


def _padded(step: Step, rows: Sequence[Ints]) -> Tensor:
    """[rows, width] token ids, 0 behind the end and in filler rows."""
    ids = torch.zeros(step.rows, step.width, dtype=torch.long)
    for place, segment in enumerate(step.segments):
        ids[place, : segment.stop - segment.start] = torch.from_numpy(rows[segment.row][segment.start : segment.stop])
    return ids


def _taken(caches: dict[int, tuple[Any, int]], step: Step) -> Any:
    """The cache that a step continues, for as many rows as it has; the last to come takes the cache itself."""
    cache, left = caches.pop(step.after)
    if left > 1:
        caches[step.after] = (cache, left - 1)
        cache = deepcopy(cache)
    if step.rows > 1:
        cache.reorder_cache(torch.zeros(step.rows, dtype=torch.long))
    return cache
