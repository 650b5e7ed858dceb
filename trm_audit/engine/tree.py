"""Attention over a prefix tree laid end to end: each segment sees its ancestors and itself.

Steps come depth first (`plan.tree_steps`), so while a segment is computed the key-value buffer of a layer holds, from
position 0 up to the segment's start, exactly its ancestors: it appends its own and attends to what is there. Nothing is
gathered, copied or forgotten explicitly, and the buffer is as long as the longest path, whatever the number of
sequences. Keys are those of the model's own rotation at the positions of the path, so nothing is approximated.

The function takes the place of the model's attention through transformers' `AttentionInterface`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trm_audit.engine.plan import Step
from trm_audit.numerics.ragged import Ints

NAME = "trm_audit_tree"
QUERY_ROWS = 512
"""Queries of one call that needs a mask: what lies above the diagonal is computed in vain."""
MASK_BYTES = 64 << 20
"""Masks kept from layer to layer."""


class _Path:
    """Keys and values of the path that is being computed, per layer; masks of the step."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.step = capacity, Step((), ())
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[object, ...], Tensor] = {}
        self._mask_bytes = 0

    def begin(self, step: Step) -> None:
        self.step, self._mask_bytes = step, 0
        self._masks.clear()

    def extended(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The path's keys and values up to the end of a segment, [1, heads, start + n, d]."""
        if layer not in self._buffers:
            self._buffers[layer] = (self._empty(keys), self._empty(values))
        held_keys, held_values = self._buffers[layer]
        stop = start + keys.shape[2]
        held_keys[:, :, start:stop] = keys
        held_values[:, :, start:stop] = values
        return held_keys[:, :, :stop], held_values[:, :, :stop]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty(*like.shape[:2], self.capacity, like.shape[3])

    def mask(self, queries: Tensor, num_keys: int, window: int | None) -> Tensor:
        """[n, num_keys] 0 or -inf: the last query is at the last key; a window counts back from each query."""
        n = queries.shape[2]
        name = (n, num_keys, window, queries.dtype, queries.device)
        if name not in self._masks:
            at = torch.arange(num_keys - n, num_keys, device=queries.device)[:, None]
            key = torch.arange(num_keys, device=queries.device)
            outside = key > at if window is None else (key > at) | (key <= at - window)
            mask = queries.new_zeros(n, num_keys).masked_fill_(outside, -torch.inf)
            if self._mask_bytes + mask.nbytes > MASK_BYTES:
                return mask
            self._masks[name] = mask
            self._mask_bytes += mask.nbytes
        return self._masks[name]


_path = _Path(0)
"""Of the forward that is running: transformers offers attention functions no better way to be told."""


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Attention of one layer over the segments of the running step.

    Args:
        module: the layer's attention; its `layer_idx` names the buffer.
        query: [1, heads, tokens, d]; key, value: [1, key heads, tokens, d or another d].
        attention_mask: None; what a query sees is known from the step.
        scaling, sliding_window, softcap, s_aux: as transformers gives them; s_aux are attention sinks.

    Returns:
        [1, tokens, heads, d] and no weights.
    """
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    at = 0
    for segment in _path.step.segments:
        here = slice(at, at + segment.stop - segment.start)
        at = here.stop
        keys, values = key[:, :, here], value[:, :, here]
        if segment.shared or segment.start:
            keys, values = _path.extended(module.layer_idx, segment.start, keys, values)
        for first, last in _blocks(segment.start, segment.stop, window, plain=softcap is None and s_aux is None):
            low = 0 if window is None else max(0, segment.start + first - window + 1)
            seen = slice(low, segment.start + last)
            asked = query[:, :, here][:, :, first:last]
            found = _attend(asked, keys[:, :, seen], values[:, :, seen], scale, window, softcap, s_aux)
            out[:, here][:, first:last] = found.transpose(1, 2)
    return out, None


def _blocks(start: int, stop: int, window: int | None, *, plain: bool) -> Iterator[tuple[int, int]]:
    """A segment's queries in blocks; whole where no mask is needed."""
    n = stop - start
    step = n if plain and window is None and start == 0 else QUERY_ROWS
    return ((first, min(first + step, n)) for first in range(0, n, step))


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[1, heads, n, d], the last query at the last key."""
    n, num_keys = query.shape[2], keys.shape[2]
    if softcap is not None or sinks is not None:
        return _weighed(query, keys, values, scale, _path.mask(query, num_keys, window), softcap, sinks)
    grouped = query.shape[1] != keys.shape[1]
    mask: Any = None
    if (window is not None and num_keys > window) or (n != num_keys and query.device.type == "cpu"):
        mask = _path.mask(query, num_keys, window)
    elif n != num_keys:
        from torch.nn.attention.bias import causal_lower_right  # loads torch's compiler

        mask = causal_lower_right(n, num_keys)  # the fused kernels know it without being shown a matrix
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _weighed(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention with what the fused kernels do not have: a soft cap of the logits, a sink that takes weight and gives
    nothing."""
    groups = query.shape[1] // keys.shape[1]
    weights = query @ keys.repeat_interleave(groups, 1).transpose(2, 3) * scale
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    weights = (weights + mask).float()
    if sinks is None:
        weights = weights.softmax(-1)
    else:
        sink = sinks.float().view(1, -1, 1, 1).expand(1, -1, query.shape[2], 1)
        weights = torch.cat([weights, sink], -1).softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values.repeat_interleave(groups, 1)


def register(*, uncompiled: bool = False) -> None:
    """Makes the function known to transformers under `NAME`; `uncompiled` where what is around it is compiled."""
    from transformers import AttentionInterface

    function: Any = tree_attention
    if uncompiled:
        function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    AttentionInterface.register(NAME, function)


def run_tree(
    decoder: Callable[..., Any], steps: Sequence[Step], rows: Sequence[Ints], device: torch.device
) -> Iterator[Tensor]:
    """Hidden states of each step, [tokens, H]. The decoder's attention is `NAME`.

    Args:
        decoder: takes input_ids, position_ids and use_cache; returns last_hidden_state.
        steps: from `plan.tree_steps`, run in this order.
        rows: token ids of each sequence.
    """
    global _path
    segments = [segment for step in steps for segment in step.segments]
    path = _Path(max((segment.stop for segment in segments if segment.shared or segment.start), default=0))
    for step in steps:
        ids = torch.cat([torch.from_numpy(rows[s.row][s.start : s.stop]) for s in step.segments])
        positions = torch.cat([torch.arange(s.start, s.stop) for s in step.segments])
        path.begin(step)
        _path = path
        with torch.inference_mode():
            out = decoder(input_ids=ids[None].to(device), position_ids=positions[None].to(device), use_cache=False)
        yield out.last_hidden_state[0]
