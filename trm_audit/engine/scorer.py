"""Scores of one batch: the trainer's distribution against whatever evidence each row carries.

The [tokens, vocabulary] logits of the trainer never exist at once: hidden states of a micro-batch go through the head
`head_rows` positions at a time, and each piece is compared and forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trm_audit.engine.model import TrainerModel
from trm_audit.engine.plan import micro_batches
from trm_audit.errors import BadInput, RowError, UsageError
from trm_audit.numerics.divergences import divergences, entropies, token_logprobs
from trm_audit.numerics.intervals import ENGINE_SLACK, intervals
from trm_audit.numerics.ragged import Floats, Ints, segment_sum
from trm_audit.numerics.sampling import sampling_logits
from trm_audit.rollout import TOKEN_SCORES, AuditedPolicy, Grade, RolloutBatch, Sampling, TokenScores
from trm_audit.shards.logits import StoredLogits

AGREEMENT = 1e-3
"""What a stored sampled log-probability may differ from the stored distribution beyond rounding (nats)."""


@dataclass(frozen=True)
class Comparison:
    """How a row's stored values and the trainer's are brought to the same footing (raw, tempered, processed).

    Attributes:
        trainer_temperature: what the trainer's logits are divided by; they are never truncated.
        rebuild: temperature, top-p, top-k still to be applied to stored full logits; None if they are as sampled.
        audited_policy: which policy the figures then speak of.

    Worked instance: raw top-K values of a rollout at temperature 0.6: Comparison(1.0, None, "raw").
    """

    trainer_temperature: float
    rebuild: tuple[float, float, int] | None
    audited_policy: AuditedPolicy


def comparison(sampling: Sampling, grade: Grade | None) -> Comparison:
    """What can be compared with what, by the stage the values were stored at.

    Full logits can be tempered and truncated afterwards, so pi_roll is rebuilt. Raw top-K and sampled values cannot
    (the normaliser contains the unseen tail): they are compared with raw values of the trainer, and nothing is
    claimed about the tempered policy.
    """
    mode, temperature = sampling.logprobs_mode, sampling.temperature
    plain = temperature == 1.0 and not sampling.truncates
    if mode == "processed" or plain:
        return Comparison(temperature, None, "sampling")
    if grade == "exact":
        pending = temperature if mode == "raw" else 1.0
        needed = pending != 1.0 or sampling.truncates
        rebuild = (pending, sampling.top_p, sampling.top_k) if needed else None
        return Comparison(temperature, rebuild, "sampling")
    if mode == "tempered":
        return Comparison(temperature, None, "tempered" if sampling.truncates else "sampling")
    return Comparison(1.0, None, "raw")


class Scorer:
    """Scores batches with a model.

    Args:
        model: the trainer.
        logits: stored full logits of the shard, or None.
        max_tokens: padded tokens of one forward.
        head_rows: positions that go through the head at once; head_rows x vocabulary logits is the largest thing held.
    """

    def __init__(self, model: TrainerModel, logits: StoredLogits | None, *, max_tokens: int, head_rows: int) -> None:
        self._model, self._logits = model, logits
        self._max_tokens, self._head_rows = max_tokens, head_rows

    @torch.inference_mode()
    def score(self, batch: RolloutBatch) -> TokenScores:
        """Scores every policy token of a batch.

        Raises:
            BadInput: the model's output is not a number, or a sequence is longer than its positions.
            UsageError: the device is out of memory.
            RowError: stored logits are not (rule 11).
        """
        out = empty_scores(batch, [comparison(s, g) for s, g in zip(batch.sampling, batch.grade, strict=True)])
        num_policy = segment_sum(batch.response_mask.astype(np.float64), batch.response.offsets)
        lengths = np.where(num_policy > 0, batch.prompt.lengths + batch.response.lengths, 0)
        for rows in micro_batches(lengths.tolist(), self._max_tokens, alone=self._model.alone):
            try:
                self._micro_batch(batch, rows, out)
            except torch.OutOfMemoryError as error:
                raise UsageError(
                    f"the device is out of memory with {len(rows)} rows of up to {int(lengths[rows[0]])} tokens",
                    place=batch.place(rows[0]),
                    next_step="Lower --max-tokens or --head-rows.",
                ) from error
            except IndexError as error:  # a table of learned positions has an end
                raise BadInput(
                    f"the model cannot take a sequence of {int(lengths[rows[0]])} tokens ({error})",
                    place=batch.place(rows[0]),
                    next_step="Its positions end earlier (max_position_embeddings): leave longer rollouts out.",
                ) from error
        return out

    def _micro_batch(self, batch: RolloutBatch, rows: list[int], out: TokenScores) -> None:
        ids = [torch.from_numpy(np.concatenate([batch.prompt[row], batch.response[row]])) for row in rows]
        if len(rows) == 1 and len(ids[0]) > self._max_tokens:
            for first, hidden in self._model.pieces(ids[0], self._max_tokens):
                self._positions(batch, rows, hidden, first, out)
        else:
            self._positions(batch, rows, self._model.hidden(ids), 0, out)

    def _positions(self, batch: RolloutBatch, rows: list[int], hidden: Tensor, first: int, out: TokenScores) -> None:
        """Scores the policy tokens that hidden states [rows, n, H] of the positions first..first + n predict."""
        tokens, where = [], []
        for place, row in enumerate(rows):
            start = batch.response.offsets[row]
            at = np.flatnonzero(batch.response_mask[start : batch.response.offsets[row + 1]])
            position = batch.prompt.lengths[row] - 1 + at - first
            here = (position >= 0) & (position < hidden.shape[1])
            tokens.append(start + at[here])
            where.append(np.stack([np.full_like(at, place), position], 1)[here])
        flat, positions = np.concatenate(tokens), torch.from_numpy(np.concatenate(where)).to(hidden.device)
        for i in range(0, len(flat), self._head_rows):
            piece = positions[i : i + self._head_rows]
            logits = self._model.logits(hidden[piece[:, 0], piece[:, 1]])
            _Piece(batch, flat[i : i + self._head_rows], self._logits, out).score(logits)


class _Piece:
    """Some tokens of a batch whose trainer logits are at hand.

    Args:
        batch: the batch.
        tokens: [n] indices into the batch's response tokens, those of a row together.
        logits: stored full logits.
        out: where the scores go.
    """

    def __init__(self, batch: RolloutBatch, tokens: Ints, logits: StoredLogits | None, out: TokenScores) -> None:
        self.batch, self.tokens, self.logits, self.out = batch, tokens, logits, out
        self.rows = np.searchsorted(batch.response.offsets, tokens, side="right") - 1
        self.grades = np.array([batch.grade[row] for row in self.rows])
        self.plans = {row: comparison(batch.sampling[row], batch.grade[row]) for row in set(self.rows.tolist())}

    def score(self, trainer: Tensor) -> None:
        """trainer: [n, V] float32, the model's raw logits; changed in place."""
        temperature = torch.tensor([self.plans[row].trainer_temperature for row in self.rows], device=trainer.device)
        if bool((temperature != 1).any()):
            trainer /= temperature[:, None]
        ids = torch.from_numpy(self.batch.response.values[self.tokens]).to(trainer.device)
        logprobs = token_logprobs(trainer, ids)
        if bool(logprobs.isnan().any()):
            row = int(self.rows[int(logprobs.isnan().nonzero()[0])])
            raise BadInput(
                "the model's logits are not a number here",
                place=self.batch.place(row),
                next_step="The checkpoint is damaged, or overflows in this --dtype: try --dtype float32.",
            )
        self._put("trainer_logprobs", self.tokens, logprobs)
        self._exact(trainer)
        self._interval(trainer)
        rest = np.flatnonzero(self.grades != "exact")
        if len(rest):
            self._put("trainer_entropy", self.tokens[rest], entropies(trainer[torch.from_numpy(rest)]))
        lr = self.out.tokens["trainer_logprobs"][self.tokens] - self.out.rollout_logprobs[self.tokens]
        self.out.tokens["log_ratio"][self.tokens] = lr

    def _put(self, name: str, tokens: Ints, values: Tensor) -> None:
        self.out.tokens[name][tokens] = values.double().cpu().numpy()

    def _exact(self, trainer: Tensor) -> None:
        for row in dict.fromkeys(self.rows[self.grades == "exact"].tolist()):
            assert self.logits is not None
            mine = np.flatnonzero(self.rows == row)
            tokens = self.tokens[mine]
            stored = self._stored(row, tokens - self.batch.response.offsets[row])
            stored = stored.to(trainer.device)[:, : trainer.shape[1]].float()
            rollout = self._rebuilt(row, tokens, stored)
            self._rollout_logprobs(row, tokens, stored, rollout)
            scores = divergences(rollout, trainer[int(mine[0]) : int(mine[-1]) + 1])
            for name in ("kl", "kl_reverse", "tv", "rollout_entropy", "trainer_entropy"):
                self._put(name, tokens, getattr(scores, name))

    def _rebuilt(self, row: int, tokens: Ints, stored: Tensor) -> Tensor:
        """Logits of pi_roll, [n, V].

        A token that was sampled was not truncated: where the rebuilt truncation says so, it is put back and counted.
        """
        rebuild = self.plans[row].rebuild
        if rebuild is None:
            return stored
        rollout = sampling_logits(stored, *rebuild)
        ids = torch.from_numpy(self.batch.response.values[tokens]).to(stored.device)[:, None]
        lost = rollout.gather(1, ids).isneginf()
        self.out.num_disagreements[row] += int((lost & ~stored.gather(1, ids).isneginf()).sum())
        return rollout.scatter(1, ids, stored.gather(1, ids) / rebuild[0])

    def _stored(self, row: int, at: Ints) -> Tensor:
        """Stored logits of some positions, [n, V], read run by run: between two turns of a dialogue lie tool tokens."""
        assert self.logits is not None
        runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
        name = self.batch.rollout_id[row]
        return torch.cat([self.logits.rows(name, int(run[0]), int(run[-1]) + 1) for run in runs])

    def _rollout_logprobs(self, row: int, tokens: Ints, stored: Tensor, rollout: Tensor) -> None:
        """Checks the sampled values against the stored distribution, and replaces those that are not of pi_roll."""
        assert self.logits is not None
        ids = torch.from_numpy(self.batch.response.values[tokens]).to(stored.device)
        expected = token_logprobs(stored, ids).cpu().numpy()
        given = self.batch.rollout_logprobs[tokens]
        largest = torch.where(stored.isneginf(), 0, stored).abs().amax(1).double().cpu().numpy()
        tolerance = AGREEMENT + 2 * self.logits.step(self.batch.rollout_id[row]) * largest
        excluded = np.isneginf(expected)
        if (excluded & np.isnan(given)).any():
            at = int(tokens[np.flatnonzero(excluded)[0]] - self.batch.response.offsets[row])
            raise RowError(
                f"the token at position {at} of response_ids has probability 0 in the stored logits",
                place=self.batch.place(row),
                next_step="Row t is what token t was drawn from, nothing is shifted (schemas/rollout.md, rule 11).",
            )
        off = (~np.isnan(given) & ~(np.abs(given - expected) <= tolerance)) | excluded
        self.out.num_disagreements[row] += int(off.sum())
        if self.out.rebuilt[row]:
            self.out.rollout_logprobs[tokens] = token_logprobs(rollout, ids).cpu().numpy()

    def _interval(self, trainer: Tensor) -> None:
        mine = np.flatnonzero(self.grades == "interval")
        if not len(mine):
            return
        topk = self.batch.topk
        assert topk is not None
        tokens = self.tokens[mine]
        ids, logp = self._points(tokens)
        floor = topk.logprobs[topk.offsets[tokens + 1] - 1]
        logq = trainer[torch.from_numpy(mine)].log_softmax(1)
        device = trainer.device
        bounds = intervals(
            logq,
            torch.from_numpy(ids).to(device),
            torch.from_numpy(logp).to(device),
            torch.from_numpy(floor).to(device),
            topk.step,
        )
        for name in ("kl_lower", "kl_upper", "tv_lower", "tv_upper"):
            self._put(name, tokens, getattr(bounds, name))
        self._check_sampled(tokens, ids, logp, floor, topk.step)

    def _points(self, tokens: Ints) -> tuple[NDArray[np.int64], Floats]:
        """[n, K + 1] ids and log-probabilities that are known: the list, and the sampled token where it is outside."""
        topk = self.batch.topk
        assert topk is not None
        start, count = topk.offsets[tokens], np.diff(topk.offsets)[tokens]
        width = int(count.max())
        inside = np.arange(width) < count[:, None]
        source = np.where(inside, start[:, None] + np.arange(width), start[:, None])
        ids = topk.ids[source]
        logp = np.where(inside, topk.logprobs[source], -np.inf)
        sampled = self.batch.response.values[tokens].astype(np.int64)
        listed = ((ids == sampled[:, None]) & inside).any(1)
        extra = np.where(listed, -np.inf, self.batch.rollout_logprobs[tokens])
        return np.column_stack([ids, np.where(listed, ids[:, 0], sampled)]), np.column_stack([logp, extra])

    def _check_sampled(self, tokens: Ints, ids: NDArray[np.int64], logp: Floats, floor: Floats, step: float) -> None:
        """A sampled token's value equals its entry in the list, or is at most the smallest entry where it has none."""
        sampled = self.batch.response.values[tokens].astype(np.int64)
        given = self.batch.rollout_logprobs[tokens]
        tolerance = AGREEMENT + step * np.abs(given) + ENGINE_SLACK
        hit = (ids[:, :-1] == sampled[:, None]) & (logp[:, :-1] > -np.inf)
        listed = np.where(hit, logp[:, :-1], 0.0).sum(1)
        with np.errstate(invalid="ignore"):
            off = np.where(hit.any(1), np.abs(listed - given) > tolerance, given > floor + tolerance)
        rows = np.searchsorted(self.batch.response.offsets, tokens, side="right") - 1
        np.add.at(self.out.num_disagreements, rows[off], 1)


def empty_scores(batch: RolloutBatch, plans: list[Comparison]) -> TokenScores:
    """Scores of a batch before anything is scored: NaN everywhere."""
    n = len(batch.response.values)
    has = np.array(
        [
            not np.isnan(batch.rollout_logprobs[batch.response.offsets[row] : batch.response.offsets[row + 1]]).all()
            for row in range(len(batch))
        ],
        dtype=np.bool_,
    )
    exact = np.array([grade == "exact" for grade in batch.grade], dtype=np.bool_)
    pending = np.array([plan.rebuild is not None for plan in plans], dtype=np.bool_)
    return TokenScores(
        tokens={name: np.full(n, np.nan) for name in TOKEN_SCORES},
        rollout_logprobs=batch.rollout_logprobs.copy(),
        rebuilt=exact & (pending | ~has),
        audited_policy=[plan.audited_policy for plan in plans],
        num_disagreements=np.zeros(len(batch), dtype=np.int64),
    )


def score_stored(batch: RolloutBatch) -> TokenScores:
    """Scores with the trainer's own stored log-probabilities instead of a model (grade `sampled`).

    They are taken at the stage that `logprobs_mode` names, tempered for processed values.
    """
    assert batch.stored_trainer_logprobs is not None
    out = empty_scores(batch, [comparison(s, "sampled") for s in batch.sampling])
    values = np.where(batch.response_mask, batch.stored_trainer_logprobs, np.nan)
    out.tokens["trainer_logprobs"] = values
    out.tokens["log_ratio"] = values - batch.rollout_logprobs
    return out
