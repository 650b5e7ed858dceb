"""How far the precision of a run moves its scores: the same rollouts in another composition, and in float32.

Below float32 a matrix product depends on what else is computed with it. The same weights then give other scores in
another batch, and others again in float32; a threshold below that noise decides by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from trm_audit.engine.footing import comparison
from trm_audit.engine.model import TrainerModel
from trm_audit.engine.scorer import needed_tokens
from trm_audit.engine.sharing import whole_sequences
from trm_audit.engine.wide import in_float32
from trm_audit.numerics.divergences import divergences
from trm_audit.numerics.ragged import Floats, Ints
from trm_audit.rollout import Noise, NoiseSpread, RolloutBatch

ROWS = 16
"""Rollouts whose hidden states are held at once."""


@dataclass(frozen=True)
class NoiseFloor:
    """What scores of a run are worth.

    Attributes:
        num_rollouts, num_tokens: measured on.
        composition: each sequence as the run scores it against alone, in the run's precision; None if it scores them
            alone. `kl` is KL(run || alone).
        float32: as the run scores it against float32; `kl` is KL(float32 || run).
    """

    num_rollouts: int
    num_tokens: int
    composition: Noise | None
    float32: Noise

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@torch.inference_mode()
def noise_floor(model: TrainerModel, batches: Iterable[RolloutBatch], *, head_rows: int) -> NoiseFloor | None:
    """Measures on all policy tokens of some rollouts; None if there are none.

    Args:
        model: the trainer, below float32.
        batches: the rollouts; sampling temperatures are applied, truncation is not.
        head_rows: positions whose logits exist at once, three times over.
    """
    found: dict[str, list[Floats]] = {"composition": [], "composition_kl": [], "float32": [], "float32_kl": []}
    num_rollouts = 0
    for batch in batches:
        scored = [row for row in range(len(batch)) if batch.grade[row] is not None]
        num_rollouts += len(scored)
        for i in range(0, len(scored), ROWS):
            _measure(model, batch, scored[i : i + ROWS], head_rows, found)
    values = {name: np.concatenate(parts) for name, parts in found.items() if parts}
    if not values:
        return None
    composition = _noise(values, "composition") if "composition" in values else None
    return NoiseFloor(num_rollouts, len(values["float32"]), composition, _noise(values, "float32"))


def _noise(values: dict[str, Floats], name: str) -> Noise:
    return Noise(_spread(values[name]), _spread(values[f"{name}_kl"]))


def _spread(values: Floats) -> NoiseSpread:
    return NoiseSpread(float(values.mean()), float(np.quantile(values, 0.99)), float(values.max()))


def _measure(
    model: TrainerModel, batch: RolloutBatch, rows: Sequence[int], head_rows: int, found: dict[str, list[Floats]]
) -> None:
    """Adds the differences of each policy token."""
    needed = needed_tokens(batch)
    sequences = [needed[row] for row in rows]
    run = whole_sequences(model, sequences, model.sharing.rung)
    alone = whole_sequences(model, sequences, "alone") if model.sharing.rung != "alone" else None
    with in_float32(model.module):
        wide = whole_sequences(model, sequences, "alone")
    for place, row in enumerate(rows):
        temperature = comparison(batch.sampling[row], batch.grade[row]).trainer_temperature
        for positions, ids in _policy_tokens(batch, row, head_rows):
            logits = model.logits(run[place][positions]) / temperature
            if alone is not None:
                _add(found, "composition", logits, model.logits(alone[place][positions]) / temperature, ids)
            with in_float32(model.module):
                exact = model.logits(wide[place][positions]) / temperature
            _add(found, "float32", exact, logits, ids)


def _policy_tokens(batch: RolloutBatch, row: int, head_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions that predict a row's policy tokens, and these, some at a time."""
    start, stop = batch.response.offsets[row : row + 2]
    at: Ints = np.flatnonzero(batch.response_mask[start:stop])
    for i in range(0, len(at), head_rows):
        here = at[i : i + head_rows]
        ids = batch.response.values[start + here].astype(np.int64)
        yield torch.from_numpy(here + batch.prompt.lengths[row] - 1), torch.from_numpy(ids)


def _add(found: dict[str, list[Floats]], name: str, first: Tensor, second: Tensor, ids: Tensor) -> None:
    scores = divergences(first, second, ids.to(first.device))
    delta = (scores.rollout_logprobs - scores.trainer_logprobs).abs()
    found[name].append(delta.cpu().numpy())
    found[f"{name}_kl"].append(scores.kl.cpu().numpy())
