"""Some tokens' trainer logits against whatever evidence their rows carry."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trm_audit.engine.footing import comparison
from trm_audit.errors import BadInput, RowError
from trm_audit.numerics.divergences import RowStatistics, TokenDivergences, divergences, row_statistics
from trm_audit.numerics.intervals import ENGINE_SLACK, intervals
from trm_audit.numerics.ragged import Floats, Ints, segment_sum
from trm_audit.numerics.sampling import sampling_logits, with_drawn
from trm_audit.numerics.sketch import Sketch
from trm_audit.numerics.sketch_bounds import compare_sketch
from trm_audit.rollout import RolloutBatch, TokenScores
from trm_audit.shards.logits import Runs, StoredLogits

AGREEMENT = 1e-3
"""What a stored sampled log-probability may differ from the stored distribution beyond rounding (nats)."""


class Piece:
    """Some tokens of a batch, to be compared when their trainer logits are at hand.

    Args:
        batch: the batch.
        tokens: [n] indices into the batch's response tokens, those of a row together.
        positions: [n] where a step's hidden states predict them.
        logits: stored full logits.
        out: where the scores go.
        confidence: that the bounds from sketches hold at all positions of a sequence.
    """

    def __init__(
        self,
        batch: RolloutBatch,
        tokens: Ints,
        positions: Ints,
        logits: StoredLogits | None,
        out: TokenScores,
        confidence: float,
    ) -> None:
        self.batch, self.tokens, self.positions, self.logits, self.out = batch, tokens, positions, logits, out
        self.confidence = confidence
        self.rows = np.searchsorted(batch.response.offsets, tokens, side="right") - 1
        self.present = list(dict.fromkeys(self.rows.tolist()))
        self.grades = np.array([batch.grade[row] for row in self.rows])
        self.plans = {row: comparison(batch.sampling[row], batch.grade[row]) for row in self.present}

    @property
    def place(self) -> str:
        return self.batch.place(self.present[0])

    def requests(self) -> Iterator[tuple[str, Runs]]:
        """Stored logits that `score` takes, in this order."""
        for row in self.present:
            if self.batch.grade[row] == "exact":
                yield self.batch.rollout_id[row], self._runs(row)

    def _runs(self, row: int) -> Runs:
        """Response positions of a row as runs: between two turns of a dialogue lie tool tokens."""
        at = self.tokens[self.rows == row] - self.batch.response.offsets[row]
        runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
        return [(int(run[0]), int(run[-1]) + 1) for run in runs]

    def score(self, trainer: Tensor, stored: Iterator[Tensor]) -> None:
        """Compares.

        Args:
            trainer: [n, V], the model's raw logits.
            stored: gives what `requests` asked for.
        """
        temperature = torch.tensor([self.plans[row].trainer_temperature for row in self.rows], device=trainer.device)
        if bool((temperature != 1).any()):
            trainer = trainer.float() / temperature[:, None]
        ids = torch.from_numpy(self.batch.response.values[self.tokens].astype(np.int64)).to(trainer.device)
        for row in self.present:
            if self.batch.grade[row] == "exact":
                mine = np.flatnonzero(self.rows == row)
                here = slice(int(mine[0]), int(mine[-1]) + 1)
                self._exact(row, self.tokens[here], trainer[here], ids[here], next(stored))
        rest = np.flatnonzero(self.grades != "exact")
        if len(rest):
            self._without_distribution(rest, trainer, ids)
        logprobs = self.out.tokens["trainer_logprobs"][self.tokens]
        if np.isnan(logprobs).any():
            raise BadInput(
                "the model's logits are not a number here",
                place=self.batch.place(int(self.rows[int(np.flatnonzero(np.isnan(logprobs))[0])])),
                next_step="The checkpoint is damaged, or overflows in this --dtype: try --dtype float32.",
            )
        self.out.tokens["log_ratio"][self.tokens] = logprobs - self.out.rollout_logprobs[self.tokens]

    def _put(self, name: str, tokens: Ints, values: Tensor) -> None:
        self.out.tokens[name][tokens] = values.double().cpu().numpy()

    def _exact(self, row: int, tokens: Ints, trainer: Tensor, ids: Tensor, stored: Tensor) -> None:
        """Both distributions are known. stored: [n, V or more] as it was read."""
        stored = stored.to(trainer.device, non_blocking=True)[:, : trainer.shape[1]]
        rebuild = self.plans[row].rebuild
        rollout = stored if rebuild is None else self._rebuilt(row, rebuild, ids, stored)
        found = divergences(rollout, trainer, ids)
        recorded = _recorded(found) if rebuild is None else row_statistics(stored, ids)
        self._agreement(row, tokens, stored, ids, recorded)
        if self.out.rebuilt[row]:
            self.out.rollout_logprobs[tokens] = found.rollout_logprobs.cpu().numpy()
        for name in ("kl", "kl_reverse", "tv", "rollout_entropy", "trainer_entropy", "trainer_logprobs"):
            self._put(name, tokens, getattr(found, name))

    def _rebuilt(self, row: int, rebuild: tuple[float, float, int], ids: Tensor, stored: Tensor) -> Tensor:
        """Logits of pi_roll, [n, V].

        A token that was sampled was not truncated: where the rebuilt truncation says so, it is put back and counted.
        """
        stored = stored.float()
        rollout = sampling_logits(stored, *rebuild)
        lost = rollout.gather(1, ids[:, None]).isneginf()
        self.out.num_disagreements[row] += int((lost & ~stored.gather(1, ids[:, None]).isneginf()).sum())
        return with_drawn(rollout, stored, ids, rebuild[0])

    def _agreement(self, row: int, tokens: Ints, stored: Tensor, ids: Tensor, found: RowStatistics) -> None:
        """Checks the sampled values against the stored distribution."""
        assert self.logits is not None
        if not bool(found.logsumexp.isfinite().all()):
            self.logits.diagnose(self.batch.rollout_id[row], stored, self._runs(row))
        expected, log_mass, entropy = (x.cpu().numpy() for x in (found.logprobs, found.logsumexp, found.entropy))
        given = self.batch.rollout_logprobs[tokens]
        excluded = np.isneginf(expected)
        if (excluded & np.isnan(given)).any():
            at = int(tokens[np.flatnonzero(excluded)[0]] - self.batch.response.offsets[row])
            raise RowError(
                f"the token at position {at} of response_ids has probability 0 in the stored logits",
                place=self.batch.place(row),
                next_step="Row t is what token t was drawn from, nothing is shifted (schemas/rollout.md, rule 11).",
            )
        tolerance = agreement(expected + log_mass, log_mass, entropy, self.logits.step(self.batch.rollout_id[row]))
        off = (~np.isnan(given) & ~(np.abs(given - expected) <= tolerance)) | excluded
        self.out.num_disagreements[row] += int(off.sum())

    def _without_distribution(self, mine: Ints, trainer: Tensor, ids: Tensor) -> None:
        """Tokens of rows whose evidence is a list or the sampled value alone."""
        if len(mine) < len(trainer):
            at = torch.from_numpy(mine).to(trainer.device)
            trainer, ids = trainer[at], ids[at]
        found = row_statistics(trainer, ids)
        self._put("trainer_logprobs", self.tokens[mine], found.logprobs)
        self._put("trainer_entropy", self.tokens[mine], found.entropy)
        for compare, kind in ((self._interval, "interval"), (self._sketched, "sketch")):
            listed = np.flatnonzero(self.grades[mine] == kind)
            if len(listed):
                here = torch.from_numpy(listed).to(trainer.device)
                some = (
                    (trainer, found.logsumexp) if len(listed) == len(mine) else (trainer[here], found.logsumexp[here])
                )
                compare(mine[listed], *some)
        if self.batch.stored_entropy is not None:
            self.out.tokens["rollout_entropy"][self.tokens[mine]] = self.batch.stored_entropy[self.tokens[mine]]

    def _interval(self, mine: Ints, trainer: Tensor, logsumexp: Tensor) -> None:
        """Tokens of which a list is known."""
        topk = self.batch.topk
        assert topk is not None
        tokens = self.tokens[mine]
        ids, logp = self._points(tokens)
        floor = topk.logprobs[topk.offsets[tokens + 1] - 1]
        known, log_known, log_floor = (torch.from_numpy(values).to(trainer.device) for values in (ids, logp, floor))
        bounds = intervals(trainer, known, log_known, log_floor, topk.step, logsumexp)
        for name in ("kl_lower", "kl_upper", "tv_lower", "tv_upper"):
            self._put(name, tokens, getattr(bounds, name))
        self._check_sampled(tokens, ids, logp, floor, topk.step)

    def _sketched(self, mine: Ints, trainer: Tensor, logsumexp: Tensor) -> None:
        """Tokens of which a list is known, and a projection of the rest; those of one dimension and seed together."""
        sketches = self.batch.sketches
        assert sketches is not None
        rows = self.rows[mine]
        made = np.stack([sketches.dim[rows], sketches.seed[rows]], axis=1)
        kinds, kind = np.unique(made, axis=0, return_inverse=True)
        for i, (_, seed) in enumerate(kinds.tolist()):
            at = np.flatnonzero(kind == i)
            some = torch.from_numpy(at).to(trainer.device)
            self._of_one_seed(mine[at], trainer[some], logsumexp[some], seed)

    def _of_one_seed(self, mine: Ints, trainer: Tensor, logsumexp: Tensor, seed: int) -> None:
        topk, tokens = self.batch.topk, self.tokens[mine]
        assert topk is not None
        ids, logp = self._points(tokens)
        floor = topk.logprobs[topk.offsets[tokens + 1] - 1]
        self._check_sampled(tokens, ids, logp, floor, topk.step)
        bounds = compare_sketch(
            self._stored_sketch(tokens, self.rows[mine], ids[:, :-1], logp[:, :-1], trainer.device),
            trainer,
            seed=seed,
            positions=self._num_positions(self.rows[mine]),
            step=topk.step,
            confidence=self.confidence,
            logsumexp=logsumexp,
        )
        for name in ("kl_estimate", "kl_lower", "kl_upper", "tv_lower", "tv_upper", "hellinger2"):
            self._put(name, tokens, getattr(bounds, name))

    def _stored_sketch(
        self, tokens: Ints, rows: Ints, ids: NDArray[np.int64], logp: Floats, device: torch.device
    ) -> Sketch:
        """Of some tokens of one dimension. ids, logp: [n, K] their lists, -inf where a list has ended."""
        sketches, first = self.batch.sketches, self.batch.response.offsets
        assert sketches is not None
        at = sketches.vectors.offsets[rows] + (tokens - first[rows]) * sketches.dim[rows]
        vectors = sketches.vectors.values[at[:, None] + np.arange(sketches.dim[rows[0]])]
        stored = (ids, logp, vectors, sketches.tail_mass[tokens], np.full(len(tokens), np.nan))
        return Sketch(*(torch.from_numpy(np.ascontiguousarray(values)).to(device) for values in stored))

    def _num_positions(self, rows: Ints) -> Ints:
        """[n] policy tokens of the sequence that each token is of."""
        of_row = segment_sum(self.batch.response_mask.astype(np.float64), self.batch.response.offsets)
        return of_row[rows].astype(np.int64)

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


def agreement(drawn: Floats, log_mass: Floats, entropy: Floats, step: float) -> Floats:
    """[n] what sampled log-probabilities may differ from those of stored logits.

    Args:
        drawn: [n] logits of the sampled tokens.
        log_mass: [n] log-sum-exp of all logits.
        entropy: [n] of the distribution.
        step: largest relative rounding error of a logit: it moves the sampled one by step times its size, and the
            normaliser by step times the expected size, which is at most abs(log_mass) + entropy.
    """
    return AGREEMENT + step * (np.abs(drawn) + np.abs(log_mass) + entropy)


def _recorded(found: TokenDivergences) -> RowStatistics:
    """What a comparison says of the stored side alone."""
    return RowStatistics(found.rollout_logprobs, found.rollout_entropy, found.rollout_logsumexp)
