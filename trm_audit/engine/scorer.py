"""Scores of one batch: the trainer's distribution against whatever evidence each row carries.

The [tokens, vocabulary] logits of the trainer never exist at once: hidden states of a step go through the head
`head_rows` positions at a time, and each piece is compared and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from trm_audit.engine.evidence import Piece
from trm_audit.engine.footing import comparison
from trm_audit.engine.model import TrainerModel
from trm_audit.engine.plan import Step
from trm_audit.engine.routing import RoutingComparison
from trm_audit.engine.stored import empty_scores
from trm_audit.errors import BadInput, UsageError
from trm_audit.numerics.ragged import Ints
from trm_audit.rollout import RolloutBatch, TokenScores
from trm_audit.shards.logits import Runs, StoredLogits
from trm_audit.shards.read_ahead import logits_ahead


class Scorer:
    """Scores batches with a model.

    Args:
        model: the trainer.
        logits: stored full logits of the shard, or None.
        head_rows: positions that go through the head at once; head_rows x vocabulary logits is the largest thing held.
        max_tokens: tokens of one forward; None takes the model's.
        read_ahead: read stored logits in threads beside the forward.
        confidence: that the bounds from sketches hold at all positions of a sequence.
    """

    def __init__(
        self,
        model: TrainerModel,
        logits: StoredLogits | None,
        *,
        head_rows: int,
        max_tokens: int | None = None,
        read_ahead: bool = True,
        confidence: float = 0.95,
    ) -> None:
        self._model, self._logits, self._head_rows, self._confidence = model, logits, head_rows, confidence
        self._max_tokens, self._read_ahead = max_tokens, read_ahead

    def score(self, batch: RolloutBatch) -> TokenScores:
        """Scores every policy token of a batch.

        Raises:
            BadInput: the model's output is not a number, or a sequence is longer than its positions.
            UsageError: the device is out of memory.
            RowError: stored logits are not as rule 11 says, or stored routing is not that of such a model (rule 12).
        """
        out = empty_scores(batch, [comparison(s, g) for s, g in zip(batch.sampling, batch.grade, strict=True)])
        rows = needed_tokens(batch)
        steps = self._model.steps(rows, max_tokens=self._max_tokens)
        pieces = [list(self._pieces(batch, step, out)) for step in steps]
        requests = (request for of_step in pieces for piece in of_step for request in piece.requests())
        carried = batch.routed_experts is not None and batch.routed_experts.layers.any()
        routing = RoutingComparison(self._model.experts, batch, out) if carried else None
        with self._stored(requests) as stored, routing.experts.listening() if routing else nullcontext():
            self._run(steps, rows, pieces, stored, routing)
        return out

    @torch.inference_mode()
    def _run(
        self,
        steps: Sequence[Step],
        rows: Sequence[Ints],
        pieces: Sequence[Sequence[Piece]],
        stored: Iterator[Tensor],
        routing: RoutingComparison | None,
    ) -> None:
        hidden = self._model.hidden(steps, rows)
        for step, of_step in zip(steps, pieces, strict=True):
            place = of_step[0].place if of_step else ""
            with _enough_memory(step, place):
                if routing is not None:
                    routing.experts.forget()
                with _enough_positions(step, place):
                    states = next(hidden)
                for piece in of_step:
                    piece.score(self._logits_of(states, piece.positions), stored)
                    if routing is not None:
                        routing.score(piece.tokens, piece.positions, len(states))

    def _logits_of(self, states: Tensor, positions: Ints) -> Tensor:
        """[n, V] of some of a step's positions. Where shapes are constant, so is the head's."""
        n = len(positions)
        if self._model.constant and n < self._head_rows:
            positions = np.concatenate([positions, np.zeros(self._head_rows - n, dtype=np.int64)])
        at = torch.from_numpy(positions).to(states.device)
        return self._model.logits(states[at])[:n]

    @contextmanager
    def _stored(self, requests: Iterator[tuple[str, Runs]]) -> Iterator[Iterator[Tensor]]:
        """Stored logits in the order in which they will be compared."""
        if self._logits is None:
            yield iter(())
        elif self._read_ahead:
            with logits_ahead(self._logits, requests, pin=self._model.device.type == "cuda") as stored:
                yield stored
        else:
            logits = self._logits
            yield (logits.gather(*request) for request in requests)

    def _pieces(self, batch: RolloutBatch, step: Step, out: TokenScores) -> Iterator[Piece]:
        """The policy tokens that a step's positions predict, `head_rows` at a time."""
        tokens, positions = [], []
        for span in step.spans:
            first = batch.response.offsets[span.row]
            before = batch.prompt.lengths[span.row] - 1  # this position predicts response token 0
            low = max(0, span.start - before)
            high = min(span.start + span.count - before, batch.response.lengths[span.row])
            at = low + np.flatnonzero(batch.response_mask[first + low : first + max(low, high)])
            tokens.append(first + at)
            positions.append(span.at + at + before - span.start)
        flat, where = np.concatenate(tokens), np.concatenate(positions)
        order = np.argsort(flat)  # each row's together, as they are stored: segments that rows share come between
        for i in range(0, len(flat), self._head_rows):
            here = order[i : i + self._head_rows]
            yield Piece(batch, flat[here], where[here], self._logits, out, self._confidence)


def needed_tokens(batch: RolloutBatch) -> list[Ints]:
    """Token ids of each row up to the one before its last policy token; empty without one."""
    out = []
    for row in range(len(batch)):
        start, stop = batch.response.offsets[row : row + 2]
        at = np.flatnonzero(batch.response_mask[start:stop])
        used = batch.response[row][: at[-1]] if len(at) else batch.response[row][:0]
        prompt = batch.prompt[row] if len(at) else batch.prompt[row][:0]
        out.append(np.concatenate([prompt, used]).astype(np.int64))
    return out


@contextmanager
def _enough_memory(step: Step, place: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        longest = max(segment.stop for segment in step.segments)
        raise UsageError(
            f"the device is out of memory with {len(step.segments)} sequences of up to {longest} tokens",
            place=place,
            next_step="Lower --max-tokens or --head-rows.",
        ) from error


@contextmanager
def _enough_positions(step: Step, place: str) -> Iterator[None]:
    try:
        yield
    except IndexError as error:  # a table of learned positions has an end
        longest = max(segment.stop for segment in step.segments)
        raise BadInput(
            f"the model cannot take a sequence of {longest} tokens ({error})",
            place=place,
            next_step="Its positions end earlier (max_position_embeddings): leave longer rollouts out.",
        ) from error
