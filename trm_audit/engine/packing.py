"""What is kept of stored full logits when rollouts are packed, and how far stored logits are from a copy of them.

Rows are read `POSITIONS` response positions at a time, the size of a stored block, so that a block is looked at where
it lies; logits of a whole response never exist at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trm_audit.engine.evidence import agreement
from trm_audit.errors import RowError, UsageError
from trm_audit.numerics.divergences import divergences, row_statistics
from trm_audit.numerics.ragged import Floats, Ints
from trm_audit.record.evidence import Recipe, TokenEvidence, evidence, pending_logits
from trm_audit.rollout import Grade, RolloutBatch
from trm_audit.shards.logits import STEPS, StoredLogits

POSITIONS = 64
AT_ONCE = 8 * POSITIONS
"""Positions of a rollout that are copied at once."""
Kind = Literal["sketch", "topk", "sampled", "q16"]
GRADE_OF: Mapping[Kind, Grade] = {"sketch": "sketch", "topk": "interval", "sampled": "sampled", "q16": "exact"}
READING = 1e-12
"""Of a KL between stored logits and their copy in q16: what float32 rounds when the copy is read."""
SPELLINGS = "sketch:K,m, topk:K, sampled or q16"
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Target:
    """What full logits are packed to.

    Attributes:
        kind: `sketch`, `topk`, `sampled` or `q16`.
        recipe: K, m and the seed of a sketch; of `topk` only K counts, of the others nothing.

    Worked instance: Target.parse("sketch:20,64"), which str() spells the same.
    """

    kind: Kind
    recipe: Recipe = field(default_factory=Recipe)

    @classmethod
    def parse(cls, text: str, seed: int = 1) -> Target:
        """`sketch:K,m`, `topk:K`, `sampled` or `q16`. Raises UsageError for anything else."""
        if found := re.fullmatch(r"sketch:(\d+),\s*(\d+)", text):
            return cls("sketch", Recipe(int(found[1]), int(found[2]), seed))
        if found := re.fullmatch(r"topk:(\d+)", text):
            return cls("topk", Recipe(int(found[1])))
        if text == "sampled":
            return cls("sampled")
        if text == "q16":
            return cls("q16")
        raise UsageError(f"{text!r} is nothing to pack to", place="--to", next_step=f"Give {SPELLINGS}.")

    def __str__(self) -> str:
        numbers = {"sketch": f":{self.recipe.k},{self.recipe.dim}", "topk": f":{self.recipe.k}"}
        return self.kind + numbers.get(self.kind, "")

    @property
    def grade(self) -> Grade:
        """Of a packed row."""
        return GRADE_OF[self.kind]


@torch.inference_mode()
def kept_of(
    logits: StoredLogits, batch: RolloutBatch, row: int, target: Target, device: torch.device, vocab_size: int | None
) -> Arrays:
    """What is kept of the distributions that a row's policy tokens were drawn from.

    Args:
        logits: stored; they hold the row.
        batch, row: which row; its grade is `exact`.
        target: not `q16`.
        device: where it is computed.
        vocab_size: columns that count, None for all.

    Returns:
        One entry per policy token. For `sketch` what `TokenEvidence.numpy` gives; otherwise logprobs and entropy [n]
        float64, for `topk` also topk_ids [n, K], topk_logprobs [n, K] float32 (-inf stands for none) and tail_mass [n].
        Always tolerance [n] float64: what a sampled value may differ from the stored distribution (nats).

    Raises:
        RowError: a distribution is none, or excludes the token that was drawn from it.
    """
    parts, drawn = [], []
    for ids, stored in _policy_rows(logits, batch, row, vocab_size):
        here, at = stored.to(device, non_blocking=True), torch.from_numpy(ids).to(device)
        parts.append(_kept(here, at, batch, row, target))
        drawn.append(here.gather(1, at[:, None])[:, 0].double())
    if target.kind == "sketch":
        out: Arrays = TokenEvidence.cat([part for part in parts if isinstance(part, TokenEvidence)]).numpy()
    else:
        arrays = [part for part in parts if isinstance(part, dict)]
        out = {name: torch.cat([part[name] for part in arrays]).cpu().numpy() for name in arrays[0]}
    logit = torch.cat(drawn).cpu().numpy()
    step = logits.step(batch.rollout_id[row])
    return out | {"tolerance": agreement(logit, logit - out["logprobs"], out["entropy"], step)}


def is_rounded(logits: StoredLogits, rollout_id: str) -> bool:
    """Whether logits are stored with less than float32 precision, so that the engine's own values were of others."""
    return logits.step(rollout_id) > STEPS[torch.float32]


def _kept(
    stored: Tensor, ids: Tensor, batch: RolloutBatch, row: int, target: Target
) -> TokenEvidence | dict[str, Tensor]:
    if target.kind == "sketch":
        return evidence(stored, ids, batch.sampling[row], target.recipe)
    rollout = pending_logits(stored, ids, batch.sampling[row])
    found = row_statistics(rollout, ids)
    if target.kind == "sampled":
        return {"logprobs": found.logprobs, "entropy": found.entropy}
    top = rollout.float().topk(min(target.recipe.k, rollout.shape[1]), dim=1)
    listed = top.values.double() - found.logsumexp[:, None]
    tail = (1 - listed.exp().sum(1)).clamp(min=0)
    return {
        "logprobs": found.logprobs,
        "entropy": found.entropy,
        "topk_ids": top.indices,
        "topk_logprobs": listed.clamp(max=0).float(),
        "tail_mass": tail,
    }


def _policy_rows(
    logits: StoredLogits, batch: RolloutBatch, row: int, vocab_size: int | None
) -> Iterator[tuple[Ints, Tensor]]:
    """(token ids [n], stored logits [n, V]) of a row's policy tokens, those of a stored block at a time."""
    name = batch.rollout_id[row]
    first, last = batch.response.offsets[row : row + 2]
    at = np.flatnonzero(batch.response_mask[first:last])
    for some in np.split(at, np.flatnonzero(np.diff(at // POSITIONS)) + 1):
        runs = np.split(some, np.flatnonzero(np.diff(some) > 1) + 1)
        ranges = [(int(run[0]), int(run[-1]) + 1) for run in runs]
        stored = logits.gather(name, ranges)[:, :vocab_size]
        logits.diagnose(name, stored, ranges)
        ids = batch.response.values[first + some].astype(np.int64)
        _check_drawn(stored, ids, some, batch.place(row))
        yield ids, stored


def _check_drawn(stored: Tensor, ids: Ints, positions: Ints, place: str) -> None:
    """Raises RowError where a token is not among the columns, or has probability 0."""
    outside = np.flatnonzero(ids >= stored.shape[1])
    if len(outside):
        raise RowError(
            f"response_ids contains {ids[outside[0]]}, the stored logits have {stored.shape[1]} columns",
            place=place,
            next_step="Ids are those of the model's tokenizer, without padding (schemas/rollout.md, rule 2).",
        )
    excluded = stored.gather(1, torch.from_numpy(ids)[:, None])[:, 0].isneginf().numpy()
    if excluded.any():
        raise RowError(
            f"the token at position {positions[np.flatnonzero(excluded)[0]]} of response_ids has probability 0 in the "
            "stored logits",
            place=place,
            next_step="Row t is what token t was drawn from, nothing is shifted (schemas/rollout.md, rule 11).",
        )


def stored_pieces(
    logits: StoredLogits, rollout_id: str, num_tokens: int, vocab_size: int | None
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Stored logits of a rollout as `LogitsTableWriter.add` takes them: start and rows; bfloat16 as bit patterns.

    Raises:
        RowError: a distribution is none.
    """
    for start in range(0, num_tokens, AT_ONCE):
        rows = logits.rows(rollout_id, start, min(start + AT_ONCE, num_tokens))[:, :vocab_size]
        yield start, (rows.contiguous().view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


@torch.inference_mode()
def copy_loss(
    logits: StoredLogits, copy: StoredLogits, rollout_id: str, num_tokens: int, vocab_size: int | None
) -> tuple[Floats, Floats]:
    """KL(stored || copy in q16) of each position, and the most that it may be, [T] float64 each in nats.

    In float32 first, which is good to a few per cent at such distances; in float64 where that leaves a doubt.
    """
    kl, most = [np.zeros(0)], [np.zeros(0)]
    for start in range(0, num_tokens, POSITIONS):
        stop = min(start + POSITIONS, num_tokens)
        stored, found = (each.rows(rollout_id, start, stop, check=False) for each in (logits, copy))
        stored = stored[:, :vocab_size]
        low = torch.where(stored.isneginf(), torch.inf, stored).amin(1).double()
        limit = ((stored.amax(1).double() - low) / 65535).square() / 12 + READING
        here = divergences(stored, found).kl
        doubtful = here > 0.9 * limit
        if bool(doubtful.any()):
            here[doubtful] = divergences(stored[doubtful].double(), found[doubtful].double()).kl
        kl.append(here.numpy())
        most.append(limit.numpy())
    return np.concatenate(kl), np.concatenate(most)
