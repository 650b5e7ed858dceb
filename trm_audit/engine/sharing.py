"""How common prefixes are computed once, and the check at the start that a way is exact for the model at hand.

    tree     all sequences end to end, each seeing its own path only; nothing padded, everything shared
    fork     the key-value cache of a prefix is copied for what follows; right for recurrent and convolutional state too
    packed   as tree, but nothing shared
    padded   batches of similar length
    alone    one sequence at a time, whole: what the others are compared with

A model that a way is wrong for gives other numbers without complaint (a library path that takes a jump in positions for
a new document is off by 0.1 to 3 nats), so no way is trusted by the architecture's name: one made-up group is computed
with it and sequence by sequence. The comparison is made in float32 whatever the run's precision, for in bfloat16 the
noise of 0.4 would hide what is looked for; and, because kernels differ by type, once more in the run's own, where the
mean divergence must not be far above that of plain padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from trm_audit.engine.wide import in_float32
from trm_audit.errors import UsageError
from trm_audit.numerics.divergences import divergences
from trm_audit.numerics.ragged import Ints

if TYPE_CHECKING:
    from trm_audit.engine.model import TrainerModel

RUNGS = ("tree", "fork", "packed", "padded", "alone")
"""Best first."""
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
"""Position scalings that look at the longest row of a batch."""
TOLERANCE = 1e-4
"""Largest difference of a log-probability in float32. A wrong way is off by 0.1; SmolLM2 by 4e-5 to 7e-5 on any rung,
most of it in tokens of a log-probability near -40. A model that float32 rounds further apart is scored one by one."""
NOISE_FACTOR, NOISE_FLOOR = 10.0, 1e-2
"""In the run's own precision: mean KL at most this many times that of padding, and this many nats."""
HEAD_ROWS = 128
_REFUSALS = (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError, NotImplementedError)
"""What a model raises that cannot be run this way."""


@dataclass(frozen=True)
class Sharing:
    """Outcome of the check.

    Attributes:
        rung: the way taken.
        check: largest difference of a log-probability from one sequence at a time, in float32; None if none was made.
        refused: better ways that were not taken -> their difference, or why they could not be run.

    Worked instance: Sharing("fork", 4e-6, {"tree": 0.31}) of a model with convolutions.
    """

    rung: str
    check: float | None = None
    refused: dict[str, float | str] = field(default_factory=dict)

    def sentence(self) -> str:
        """For the user, at the start of a run."""
        checked = "" if self.check is None else f" (checked in float32: off by {self.check:.1e} at most)"
        why = "".join(f"; not {rung}: {_reason(off)}" for rung, off in self.refused.items())
        return f"sequences are scored {_WORDS[self.rung]}{checked}{why}"


_WORDS = {
    "tree": "as prefix trees, each common prefix once",
    "fork": "with forked caches, each common prefix once",
    "packed": "packed without padding",
    "padded": "in padded batches",
    "alone": "one by one",
}


def choose(model: TrainerModel, wanted: str) -> Sharing:
    """The best rung that is exact for a model, or the wanted one.

    Args:
        model: loaded; may be asked for any rung.
        wanted: a rung, or `auto`.

    Raises:
        UsageError: the wanted rung is not known, or wrong for this model.
    """
    if wanted not in ("auto", *RUNGS):
        raise UsageError(f"--sharing {wanted}: auto, {', '.join(RUNGS)} are known")
    refused: dict[str, float | str] = {}
    for rung in RUNGS[:-1] if wanted == "auto" else (wanted,):
        exact, off = (True, 0.0) if rung == "alone" else _checked(model, rung)
        if exact and isinstance(off, float):
            return Sharing(rung, off, refused)
        refused[rung] = off
    if wanted == "auto":
        return Sharing("alone", None, refused)
    raise UsageError(
        f"--sharing {wanted} is not possible with this model: {_reason(refused[wanted])}",
        next_step="Leave it out: auto takes the best way that is exact.",
    )


def continues(model: TrainerModel) -> bool:
    """Whether a long sequence may be computed piece by piece, each with the cache of those before."""
    return _checked(model, "padded", pieces=True)[0]


def _reason(off: float | str) -> str:
    return off if isinstance(off, str) else f"scores would be off by {off:.1e}"


def _checked(model: TrainerModel, rung: str, *, pieces: bool = False) -> tuple[bool, float | str]:
    """Whether a rung is exact, and its largest difference in float32, or why it cannot be taken."""
    if rope_types(model.module.config) & BATCH_DEPENDENT_ROPE:
        return False, "positions depend on the longest sequence of a batch"
    rows = probe(model.vocab_size, longest_window(model.module), max_positions(model.module))
    whole = sum(map(len, rows))
    plain = rung == "padded" and not pieces
    budget = whole if plain else max(map(len, rows)) // 2 + 3
    try:
        with in_float32(model.module) if model.dtype != torch.float32 else nullcontext():
            off, _ = _difference(model, rows, rung, budget)
        if off > TOLERANCE or plain or model.dtype == torch.float32:
            return off <= TOLERANCE, off
        _, noise = _difference(model, rows, "padded", whole)
        _, found = _difference(model, rows, rung, budget)
    except _REFUSALS as error:
        return False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    if found <= NOISE_FACTOR * noise + NOISE_FLOOR:
        return True, off
    return False, f"in {str(model.dtype).removeprefix('torch.')} a mean KL of {found:.1e}, {noise:.1e} when padded"


def probe(vocab_size: int, window: int, max_positions: int) -> list[Ints]:
    """Made-up sequences: a prefix longer than the sliding window, branches of branches, an end midway, a stranger."""
    ids = np.random.default_rng(0).integers(0, vocab_size, window + 200).astype(np.int64)
    first = max(24, min(window + 8, max_positions - 48))
    prefix, rest = ids[:first], ids[first:]
    turn = rest[:20]
    rows = [
        np.concatenate([prefix, rest[20:25]]),
        np.concatenate([prefix, turn, rest[30:37]]),
        np.concatenate([prefix, rest[40:51]]),
        np.concatenate([prefix, turn, rest[60:69]]),
        np.concatenate([prefix, turn]),
        rest[70:83],
    ]
    return [row[:max_positions] for row in rows]


def _difference(model: TrainerModel, rows: Sequence[Ints], rung: str, max_tokens: int) -> tuple[float, float]:
    """Largest difference of a log-probability from one sequence at a time, and the mean KL."""
    found = whole_sequences(model, rows, rung, max_tokens, pieces=True)
    worst, total, count = 0.0, 0.0, 0
    for hidden, alone in zip(found, whole_sequences(model, rows, "alone"), strict=True):
        for i in range(0, len(hidden), HEAD_ROWS):
            here, wanted = model.logits(hidden[i : i + HEAD_ROWS]), model.logits(alone[i : i + HEAD_ROWS])
            off = float((here.float().log_softmax(1) - wanted.float().log_softmax(1)).abs().max())
            worst = max(worst, off if off == off else float("inf"))
            total += float(divergences(wanted, here).kl.sum())
            count += len(here)
    return worst, total / count


def whole_sequences(
    model: TrainerModel,
    rows: Sequence[Ints],
    rung: str,
    max_tokens: int | None = None,
    pieces: bool | None = None,
) -> list[Tensor]:
    """Hidden states of all positions of some sequences, [length, H] each, computed by a rung (see `model.steps`)."""
    steps = model.steps(rows, rung=rung, max_tokens=max_tokens, pieces=pieces)
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    for step, states in zip(steps, model.hidden(steps, rows, rung=rung), strict=True):
        for span in step.spans:
            if not span.start:
                out[span.row] = states.new_full((len(rows[span.row]), states.shape[1]), torch.nan)
            out[span.row][span.start : span.start + span.count] = states[span.at : span.at + span.count]
    return out


def longest_window(module: nn.Module) -> int:
    """Longest sliding window of a model's layers, 0 without."""
    config: Any = module.config
    windows = [getattr(layer, "sliding_window", None) for layer in (config, *module.modules())]
    windows.append(getattr(config, "attention_chunk_size", None))
    return max((window for window in windows if isinstance(window, int)), default=0)


def max_positions(module: nn.Module) -> int:
    """Positions that a model has, a very large number if it does not say."""
    config: Any = module.config
    return int(getattr(config, "max_position_embeddings", None) or 1 << 40)


def rope_types(config: Any) -> set[str]:
    """Position scalings of a model: one, or one per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {one.get("rope_type", "default") for one in (rope, *rope.values()) if isinstance(one, dict)}
