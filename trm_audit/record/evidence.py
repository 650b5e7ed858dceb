"""What a recorder keeps of the distribution that a token was drawn from: its top K, a sketch of the rest, the token.

A plain function for every engine: `evidence(logits, token_ids, sampling)` gives tensors on the engine's own device,
`RolloutWriter.add` puts them into a rollout shard. What is kept is of pi_roll itself, tempered and truncated, so that
the audit is of the policy that sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trm_audit.errors import UsageError
from trm_audit.numerics.rows import checked_ids
from trm_audit.numerics.sampling import sampling_logits, with_drawn
from trm_audit.numerics.sketch import LEAST_DIM, sketch
from trm_audit.rollout import Sampling

LEAST = -9000.0
"""A log-probability below it is 0 in every type: masks of -1e4 and the like. Readers take such values for fillers."""
SMALLEST = float(np.finfo(np.float32).tiny)
"""What a tail mass that float32 cannot hold is stored as: 0 says that there is no tail."""


@dataclass(frozen=True)
class Recipe:
    """What is kept of each distribution.

    Attributes:
        k: tokens kept exactly. Where the sampler truncates to its top_k, take at least as many: outside the list an
            estimate of KL counts tokens of probability 0 up to twice.
        dim: m, numbers that the others are projected to, at least 64.
        seed: of the projection's signs. One audit compares sketches of any seeds; those of a training run may share
            one, so that the signs are made once.

    Raises UsageError for numbers out of range. `trm-audit pack --plan` shows what each choice gives on one's own data.
    """

    k: int = 20
    dim: int = 64
    seed: int = 1

    def __post_init__(self) -> None:
        for name, value in (("k", self.k), ("dim", self.dim), ("seed", self.seed)):
            if type(value) is not int:
                raise UsageError(f"{name} of a recipe is a whole number, {value!r} was given")
        if self.k < 1 or self.dim < LEAST_DIM or not -(2**63) <= self.seed < 2**63:
            raise UsageError(
                f"k = {self.k}, dim = {self.dim}, seed = {self.seed} is no recipe",
                next_step=f"k is at least 1, dim at least {LEAST_DIM}, and the seed fits 64 bits.",
            )


@dataclass(frozen=True)
class TokenEvidence:
    """Evidence of n sampled tokens, as tensors of one device.

    Attributes:
        token_ids: [n] int64, what was drawn.
        logprobs: [n] float32, their log-probabilities under pi_roll (nats).
        topk_ids, topk_logprobs: [n, K] int64 and float16, the most probable tokens, descending; -inf stands for none.
        vectors: [n, m] float16, the projections (see `numerics.sketch`).
        tail_mass: [n] float32, the probability of all tokens outside the list; 0 only if there are none.
        entropy: [n] float32, of pi_roll (nats).
        recipe: how it was made.
        vocab_size: V.
    """

    token_ids: Tensor
    logprobs: Tensor
    topk_ids: Tensor
    topk_logprobs: Tensor
    vectors: Tensor
    tail_mass: Tensor
    entropy: Tensor
    recipe: Recipe
    vocab_size: int

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def cat(cls, parts: Sequence[TokenEvidence]) -> TokenEvidence:
        """Evidence of one rollout's steps, one after another; of one recipe and vocabulary."""
        first = parts[0]
        if any((part.recipe, part.vocab_size) != (first.recipe, first.vocab_size) for part in parts):
            raise ValueError("evidence of several recipes or vocabularies")
        with torch.autocast(first.token_ids.device.type, enabled=False):  # which would take cat for a product's input
            tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in TENSORS}
        return cls(**tensors, recipe=first.recipe, vocab_size=first.vocab_size)

    def rows(self, index: Tensor | Sequence[int] | slice) -> TokenEvidence:
        """Evidence of some of the tokens."""
        if not isinstance(index, slice | Tensor):
            index = torch.as_tensor(index, dtype=torch.int64, device=self.token_ids.device)
        tensors = {name: getattr(self, name)[index] for name in TENSORS}
        return TokenEvidence(**tensors, recipe=self.recipe, vocab_size=self.vocab_size)

    def numpy(self) -> dict[str, NDArray[np.generic]]:
        """On the CPU, as `shards.sketches.sketch_columns` takes it."""
        out = {name: getattr(self, name).cpu().numpy() for name in TENSORS}
        return out | {"seed": np.array(self.recipe.seed), "vocab_size": np.array(self.vocab_size)}


TENSORS = tuple(one.name for one in fields(TokenEvidence) if one.name not in ("recipe", "vocab_size"))
PLAIN = Sampling()


@torch.no_grad()
def evidence(
    logits: Tensor, token_ids: Tensor | Sequence[int], sampling: Sampling = PLAIN, recipe: Recipe | None = None
) -> TokenEvidence:
    """Evidence of n tokens from the logits that they were drawn from.

    Args:
        logits: [n, V] floating point, on any device; any constant per row. Nothing is shifted: row i is what token i
            was drawn from. Not changed.
        token_ids: [n] what was drawn.
        sampling: temperature, top-p and top-k, and in `logprobs_mode` what these logits have behind them: `raw`
            nothing, `tempered` the temperature, `processed` all. What is pending is done here (`numerics.sampling`).
        recipe: what is kept; `Recipe()` by default.

    Raises:
        ValueError: sizes do not fit, or a token id is outside the vocabulary.
        UsageError: the temperature is not above 0: greedy decoding has no distribution.

    A token that was drawn is in the support: where the truncation done here would leave it out, by a rounding that
    differs from the engine's, it is put back.
    """
    recipe = recipe or Recipe()
    ids = torch.as_tensor(token_ids, device=logits.device).long()
    if logits.ndim != 2 or len(ids) != len(logits):
        raise ValueError(f"logits {list(logits.shape)} and {len(ids)} tokens: [n, V] and n are needed")
    if not 0 < sampling.temperature < float("inf"):
        raise UsageError(
            f"temperature is {sampling.temperature:g}, above 0 is needed",
            next_step="Greedy decoding has no distribution to compare: sample, or do not record.",
        )
    ids = checked_ids(ids, logits.shape[1])
    with torch.autocast(logits.device.type, enabled=False):
        return _evidence(pending_logits(logits, ids, sampling), ids, recipe)


def _evidence(rollout: Tensor, ids: Tensor, recipe: Recipe) -> TokenEvidence:
    """Of logits of pi_roll, [n, V]."""
    kept = sketch(rollout, recipe.k, recipe.dim, recipe.seed)
    drawn, first = (rollout.gather(1, at[:, None])[:, 0].double() for at in (ids, kept.topk_ids[:, 0]))
    return TokenEvidence(
        token_ids=ids,
        logprobs=(drawn - first + kept.topk_logprobs[:, 0]).float(),
        topk_ids=kept.topk_ids,
        topk_logprobs=torch.where(kept.topk_logprobs > LEAST, kept.topk_logprobs, -torch.inf).half(),
        vectors=kept.vector,
        tail_mass=torch.where(kept.tail_mass > 0, kept.tail_mass.clamp(min=SMALLEST), 0.0).float(),
        entropy=kept.entropy.float(),
        recipe=recipe,
        vocab_size=rollout.shape[1],
    )


def pending_logits(logits: Tensor, ids: Tensor, sampling: Sampling) -> Tensor:
    """Logits of pi_roll, [n, V], from those of an earlier stage; the tokens that were drawn keep theirs."""
    temperature = sampling.temperature if sampling.logprobs_mode == "raw" else 1.0
    truncates = sampling.truncates and sampling.logprobs_mode != "processed"
    if temperature == 1.0 and not truncates:
        return logits
    top_p, top_k = (sampling.top_p, sampling.top_k) if truncates else (1.0, -1)
    return with_drawn(sampling_logits(logits, temperature, top_p, top_k), logits, ids, temperature)
