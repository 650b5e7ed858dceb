"""What evidence would decide that a sampler could have stored: verdicts that are certain from a list, from a sketch.

At some positions of a run the whole distribution of both policies is at hand, so that each kind of evidence can be made
there as a recorder makes it, and bounded as `score` bounds it:

    topk:K         the K most probable tokens and the sampled one     `numerics.intervals`, rigorous
    sketch:K,m     the same and a projection of all others            `numerics.sketch_bounds`, at a confidence

A verdict on a threshold is certain where the threshold lies outside the bounds. Where a row's own pi_roll is not known
the trainer's distribution stands in for it: how far bounds from lists are apart is a matter of the tails, which near
policies have in common, but the verdicts are then those of two policies that agree. Sketches are left out there:
between a distribution and itself a projection finds no distance at all, and would seem to decide everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from trm_audit.engine.footing import comparison
from trm_audit.engine.model import TrainerModel
from trm_audit.engine.sharing import whole_sequences
from trm_audit.errors import BadInput
from trm_audit.numerics.divergences import row_statistics
from trm_audit.numerics.intervals import Intervals, intervals
from trm_audit.numerics.ragged import Floats, Ints
from trm_audit.numerics.sampling import sampling_logits, with_drawn
from trm_audit.numerics.sketch import Sketch
from trm_audit.numerics.sketch_bounds import SketchBounds, compare_sketch
from trm_audit.record.evidence import Recipe, evidence
from trm_audit.rollout import RolloutBatch
from trm_audit.shards.logits import StoredLogits

LISTS = (8, 20, 64, 256, 1024)
RECIPE = Recipe()
DELTAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Thresholds, for KL in nats and for TV."""
MOST_TOKENS = {"cpu": 512, "cuda": 8192}
"""Policy tokens that are looked at."""
HALF = 2.0**-11
"""Lists are stored in float16."""
BOUNDS = ("kl_lower", "kl_upper", "tv_lower", "tv_upper")
Rollouts = Iterable[tuple[RolloutBatch, StoredLogits | None]]


@dataclass(frozen=True)
class Certain:
    """Verdicts on D <= delta, of `DELTAS`, that are certain: at single positions, and on a sequence's largest D."""

    positions: list[int]
    sequences: list[int]


@dataclass(frozen=True)
class Kind:
    """One kind of evidence.

    Attributes:
        bytes_per_token: what storing it takes, beside the sampled token and its log-probability.
        kl, tv: what it decides.
    """

    bytes_per_token: int
    kl: Certain
    tv: Certain


@dataclass(frozen=True)
class EvidenceWorth:
    """What each kind of evidence decides on some rollouts.

    Attributes:
        num_rollouts, num_tokens: measured on.
        num_cut: rollouts of which only the first tokens were looked at.
        num_exact: rollouts whose own pi_roll was known; for the others the trainer's distribution stood in.
        confidence: that bounds from a sketch hold at all positions of a sequence.
        full_bytes: of full logits in two bytes, which decide everything.
        deltas: the thresholds.
        kinds: by name, as `pack --to` spells it; sketches only where all are exact.
    """

    num_rollouts: int
    num_tokens: int
    num_cut: int
    num_exact: int
    confidence: float
    full_bytes: int
    deltas: list[float]
    kinds: dict[str, Kind]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class _Sample:
    """The first policy tokens of a row: `at` are their positions in the response, of `num_tokens` that it has."""

    batch: RolloutBatch
    logits: StoredLogits | None
    row: int
    at: Ints
    num_tokens: int

    @property
    def needed(self) -> Ints:
        """Token ids up to the one before the last of them."""
        response = self.batch.response[self.row][: self.at[-1]]
        return np.concatenate([self.batch.prompt[self.row], response]).astype(np.int64)

    def cut(self, num_tokens: int) -> _Sample:
        return _Sample(self.batch, self.logits, self.row, self.at[:num_tokens], self.num_tokens)


@torch.inference_mode()
def evidence_worth(
    model: TrainerModel, rollouts: Rollouts, *, head_rows: int, confidence: float
) -> EvidenceWorth | None:
    """Measures on some rollouts, or on the first tokens of each where they are long (`MOST_TOKENS` in all).

    Args:
        model: the trainer.
        rollouts: batches, each with the stored full logits of its exact rows.
        head_rows: positions whose logits exist at once.
        confidence: of bounds from a sketch.

    Returns:
        None if there is nothing to measure on, if the shortest list is the whole vocabulary, or where scoring fails:
        the run itself will then say why.
    """
    samples = _chosen(model, [one for batch, logits in rollouts for one in _samples(batch, logits)])
    if not samples or model.vocab_size <= LISTS[0]:
        return None
    try:
        hidden = whole_sequences(model, [one.needed for one in samples], model.sharing.rung)
        found = [_bounds(model, *each, head_rows, confidence) for each in zip(samples, hidden, strict=True)]
    except (BadInput, IndexError, torch.OutOfMemoryError):  # IndexError: a table of learned positions has an end
        return None
    exact = all(one.batch.grade[one.row] == "exact" for one in samples)
    lists = {f"topk:{k}" for k in LISTS}
    return EvidenceWorth(
        num_rollouts=len(samples),
        num_tokens=sum(len(one.at) for one in samples),
        num_cut=sum(len(one.at) < one.num_tokens for one in samples),
        num_exact=sum(one.batch.grade[one.row] == "exact" for one in samples),
        confidence=confidence,
        full_bytes=2 * model.vocab_size,
        deltas=list(DELTAS),
        kinds={name: _kind(name, [row[name] for row in found]) for name in found[0] if exact or name in lists},
    )


def _samples(batch: RolloutBatch, logits: StoredLogits | None) -> Iterator[_Sample]:
    for row in range(len(batch)):
        start, stop = batch.response.offsets[row : row + 2]
        at = np.flatnonzero(batch.response_mask[start:stop])
        if batch.grade[row] is not None and len(at):
            yield _Sample(batch, logits, row, at, len(at))


def _chosen(model: TrainerModel, samples: Sequence[_Sample]) -> list[_Sample]:
    """As many of the first as one forward takes, one at least, cut so that they have `MOST_TOKENS` tokens together."""
    for n in range(len(samples), 0, -1):
        most = fair_cut([one.num_tokens for one in samples[:n]], MOST_TOKENS[model.device.type])
        some = [one.cut(most) for one in samples[:n]]
        steps = model.steps([one.needed for one in some])
        size = sum(segment.stop - segment.start for step in steps for segment in step.segments)
        if n == 1 or size <= model.max_tokens:
            return some
    return []


def fair_cut(lengths: Sequence[int], most: int) -> int:
    """The largest length, 1 at least, to which all may be cut if they are to have `most` together.

    Worked instance: fair_cut([2, 9, 9], 10) is 4, which leaves 2, 4 and 4.
    """
    left, cut = most, max(lengths)
    for i, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - i)
        if length > share:
            return max(1, share)
        left -= length
    return cut


def _bounds(
    model: TrainerModel, sample: _Sample, hidden: Tensor, head_rows: int, confidence: float
) -> dict[str, Floats]:
    """Of each kind of evidence [4, n]: `BOUNDS` at the tokens of a sample. hidden: [length, H] of its sequence."""
    batch, row = sample.batch, sample.row
    plan = comparison(batch.sampling[row], batch.grade[row])
    parts = []
    for i in range(0, len(sample.at), head_rows):
        at = sample.at[i : i + head_rows]
        trainer = model.logits(hidden[torch.from_numpy(at + batch.prompt.lengths[row] - 1).to(hidden.device)])
        if plan.trainer_temperature != 1:
            trainer = trainer.float() / plan.trainer_temperature
        ids = torch.from_numpy(batch.response[row][at].astype(np.int64)).to(trainer.device)
        rollout = trainer if batch.grade[row] != "exact" else _stored(sample, plan.rebuild, at, ids, trainer)
        parts.append(bounds_of_kinds(rollout, trainer, ids, sample.num_tokens, confidence))
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def _stored(
    sample: _Sample, rebuild: tuple[float, float, int] | None, at: Ints, ids: Tensor, trainer: Tensor
) -> Tensor:
    """[n, V] logits of pi_roll, from the stored ones."""
    assert sample.logits is not None
    runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)]
    stored = sample.logits.gather(sample.batch.rollout_id[sample.row], runs).to(trainer.device)[:, : trainer.shape[1]]
    if rebuild is None:
        return stored
    return with_drawn(sampling_logits(stored, *rebuild), stored, ids, rebuild[0])


def bounds_of_kinds(
    rollout: Tensor, trainer: Tensor, ids: Tensor, num_tokens: int, confidence: float
) -> dict[str, Floats]:
    """Bounds of KL and TV that each kind of evidence of some distributions would give.

    Args:
        rollout, trainer: [n, V] logits of either side.
        ids: [n] int64 the sampled tokens.
        num_tokens: positions of the sequence: they share what the confidence of a sketch leaves.
        confidence: of bounds from a sketch.

    Returns:
        name -> [4, n] float64, `BOUNDS`; of lists and sketches that leave something out of the vocabulary.
    """
    vocab_size, logsumexp = trainer.shape[1], row_statistics(trainer).logsumexp
    out = {}
    lists = [k for k in LISTS if k < vocab_size]
    if lists:
        found = row_statistics(rollout, ids)
        top = rollout.float().topk(lists[-1], dim=1)
        listed = (top.values.double() - found.logsumexp[:, None]).half().double()
        for k in lists:
            some = _from_list(trainer, top.indices[:, :k], listed[:, :k], ids, found.logprobs, logsumexp)
            out[f"topk:{k}"] = _numbers(some)
    if vocab_size > RECIPE.k:
        kept = evidence(rollout, ids, recipe=RECIPE)
        known = Sketch(kept.topk_ids, kept.topk_logprobs, kept.vectors, kept.tail_mass.double(), kept.entropy.double())
        positions = np.full(len(ids), num_tokens)
        bounds = compare_sketch(
            known,
            trainer,
            seed=RECIPE.seed,
            positions=positions,
            step=HALF,
            confidence=confidence,
            logsumexp=logsumexp,
        )
        out[f"sketch:{RECIPE.k},{RECIPE.dim}"] = _numbers(bounds)
    return out


def _from_list(
    trainer: Tensor, top_ids: Tensor, listed: Tensor, ids: Tensor, drawn: Tensor, logsumexp: Tensor
) -> Intervals:
    """From the K most probable tokens, [n, K] ids and log-probabilities, and the drawn one where it is not in them."""
    inside = ((top_ids == ids[:, None]) & (listed > -torch.inf)).any(1)
    known = torch.column_stack([top_ids, ids])
    logp = torch.column_stack([listed, torch.where(inside, -torch.inf, drawn)])
    floor = torch.where(listed > -torch.inf, listed, torch.inf).amin(1)  # lists end where the support does
    return intervals(trainer, known, logp, floor, HALF, logsumexp)


def _numbers(bounds: Intervals | SketchBounds) -> Floats:
    return torch.stack([getattr(bounds, name) for name in BOUNDS]).cpu().numpy()


def _kind(name: str, rows: Sequence[Floats]) -> Kind:
    """What one kind decides. rows: of each rollout [4, n]."""
    kind, _, numbers = name.partition(":")
    k, *dim = map(int, numbers.split(","))
    extra = 2 * dim[0] + 12 if kind == "sketch" else 0  # projection, tail mass, entropy, sampled log-probability
    return Kind(6 * k + extra, certain([row[:2] for row in rows]), certain([row[2:] for row in rows]))


def certain(rows: Sequence[Floats]) -> Certain:
    """How many verdicts on each of `DELTAS` bounds decide: of positions, and of the sequences' largest.

    Args:
        rows: of each sequence [2, n], lower and upper bounds; NaN decides nothing.
    """
    positions = np.concatenate(rows, axis=1)
    sequences = np.stack([row.max(axis=1) for row in rows], axis=1)
    counts = ([int(((upper <= d) | (lower > d)).sum()) for d in DELTAS] for lower, upper in (positions, sequences))
    return Certain(*counts)
