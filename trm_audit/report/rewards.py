"""What the rewards say: the surrogate L', the masked objective, and PPO's unclipped terms.

An advantage may have to wait for the last rollout of its group. It depends on the group and on the row's own reward
alone, so rows are summed by (group, reward), and the formulas are applied at the end. Binary rewards make that two
entries a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from trm_audit.numerics.confidence import MeanInterval, clustered_mean
from trm_audit.numerics.histogram import Moments
from trm_audit.numerics.ragged import Bools, Floats, Ints
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.totals import KeyedTotals, sum_by_code

PPO_CLIP = 0.2
_ZERO_ADVANTAGE = 1e-12
"""A group of equal rewards has advantage 0 whatever rounding its mean left."""

_ROWS, _WEIGHT, _WEIGHT_SQUARED, _KEPT_RATIO, _ABOVE, _BELOW = range(6)


@dataclass(frozen=True)
class _Cells:
    """The (group, reward) cells as arrays, with the two baselines of each."""

    values: Floats  # [cells, 6]
    rewards: Floats
    groups: Ints  # [cells] -1 where rows have no group
    advantage: Floats  # reward minus the mean of its group, own reward included
    centred: Floats  # reward minus the mean of the others


@dataclass
class RewardTotals:
    """Sums over rows with a reward or an advantage.

    Attributes:
        cells: (group_id, reward) -> rows; sum and sum of squares of the weight sum_t (rho_t - 1); and for rows
            without a stored advantage the sum of kept seq_sum_ratio, tokens with ratio above 1 + clip, tokens below 1
            - clip.
        kept_objective: sum of keep * advantage * seq_sum_ratio where the advantage is stored.
        negative_above, positive_below: PPO's unclipped tokens where the advantage is stored.
        num_tokens: tokens of rows that have an advantage, stored or from rewards.
        num_unweighted: rows with a reward whose seq_sum_ratio is missing.
        num_unknown: kept rows without an advantage or seq_sum_ratio.
    """

    cells: KeyedTotals = field(default_factory=lambda: KeyedTotals(6))
    kept_objective: float = 0.0
    negative_above: int = 0
    positive_below: int = 0
    num_tokens: int = 0
    num_unweighted: int = 0
    num_unknown: int = 0
    num_advantages: int = 0
    min_reward: float = math.inf
    max_reward: float = -math.inf

    def add(self, batch: ScoreBatch, keep: Bools | None) -> None:
        """Add one batch; `keep` [rows] or None where nothing was decided."""
        empty = batch.empty()
        ratio = np.where(empty, 0.0, batch.filled("seq_sum_ratio"))
        weight = np.where(empty, 0.0, ratio - batch.filled("num_tokens"))
        reward, stored = batch.filled("reward"), batch.filled("advantage")
        known, given = ~np.isnan(reward), ~np.isnan(stored)
        above, below, count = _unclipped(batch)
        self.negative_above += int(above[given & (stored < -_ZERO_ADVANTAGE)].sum())
        self.positive_below += int(below[given & (stored > _ZERO_ADVANTAGE)].sum())
        self.num_tokens += int(count[given | known].sum())
        self.num_advantages += int(np.count_nonzero(given | known))
        kept = np.zeros(batch.num_rows, dtype=bool) if keep is None else keep
        self.num_unknown += int(np.count_nonzero(kept & (~(given | known) | np.isnan(ratio))))
        self.num_unweighted += int(np.count_nonzero(known & np.isnan(weight)))
        with np.errstate(invalid="ignore"):
            self.kept_objective += float((stored * ratio)[kept & given & ~np.isnan(ratio)].sum())
        kept_ratio = np.where(kept & ~np.isnan(ratio), ratio, 0.0)
        weight = np.nan_to_num(weight, nan=0.0, posinf=np.inf)
        pending = np.where(given[:, None], 0.0, np.stack([kept_ratio, above, below], axis=1))
        self._add_cells(batch, reward, np.column_stack([np.ones(batch.num_rows), weight, weight**2, pending]))

    def _add_cells(self, batch: ScoreBatch, reward: Floats, values: Floats) -> None:
        known = ~np.isnan(reward)
        if not known.any():
            return
        self.min_reward = min(self.min_reward, float(reward[known].min()))
        self.max_reward = max(self.max_reward, float(reward[known].max()))
        groups, codes = batch.codes("group_id")
        rewards, which = np.unique(reward[known], return_inverse=True)
        cells, inverse = np.unique((codes[known] + 1) * len(rewards) + which, return_inverse=True)
        names: list[Hashable] = [None, *groups]
        keys = [(names[cell // len(rewards)], float(rewards[cell % len(rewards)])) for cell in cells.tolist()]
        self.cells.add(keys, sum_by_code(inverse, values[known], len(cells)))

    def __add__(self, other: RewardTotals) -> RewardTotals:
        return RewardTotals(
            self.cells + other.cells,
            self.kept_objective + other.kept_objective,
            self.negative_above + other.negative_above,
            self.positive_below + other.positive_below,
            self.num_tokens + other.num_tokens,
            self.num_unweighted + other.num_unweighted,
            self.num_unknown + other.num_unknown,
            self.num_advantages + other.num_advantages,
            min(self.min_reward, other.min_reward),
            max(self.max_reward, other.max_reward),
        )

    @property
    def num_rewards(self) -> int:
        """Rows with a reward."""
        return int(self.cells.values[:, _ROWS].sum())

    def surrogate(self) -> MeanInterval | None:
        """L' = mean of (R - b) sum_t (rho_t - 1) with a cluster-robust interval.

        b is the mean reward of the others in the group, or of all others where the row is alone. None without rewards,
        with a single one, or where a weight is missing.
        """
        if self.num_rewards < 2 or self.num_unweighted:
            return None
        cells = self._arrays()
        with np.errstate(invalid="ignore"):
            terms = cells.centred * cells.values[:, _WEIGHT]
            squares = cells.centred**2 * cells.values[:, _WEIGHT_SQUARED]
        grouped = cells.groups >= 0
        size = int(cells.groups.max(initial=-1)) + 1
        rows = cells.values[:, _ROWS]
        sizes, sums = sum_by_code(cells.groups, np.column_stack([rows, terms]), size).T
        count = int(rows[~grouped].sum())
        mean = float(terms[~grouped].sum()) / count if count else 0.0
        with np.errstate(invalid="ignore"):
            singles = Moments(count, mean, max(float(squares[~grouped].sum()) - count * mean * mean, 0.0))
        return clustered_mean(sizes, sums, singles)

    def masked_objective(self, n_total: int) -> float | None:
        """L_masked = (1/N) sum_i keep_i A_i sum_t rho_t; None where a kept row has no advantage or no ratio."""
        if not self.num_advantages or self.num_unknown:
            return None
        cells = self._arrays()
        from_rewards = float((cells.advantage * cells.values[:, _KEPT_RATIO]).sum())
        return (self.kept_objective + from_rewards) / n_total

    def unclipped(self) -> tuple[int, int]:
        """Tokens with ratio > 1 + clip and A < 0 (unbounded), and with ratio < 1 - clip and A > 0 (bounded by A)."""
        cells = self._arrays()
        negative, positive = cells.advantage < -_ZERO_ADVANTAGE, cells.advantage > _ZERO_ADVANTAGE
        above, below = cells.values[negative, _ABOVE], cells.values[positive, _BELOW]
        return self.negative_above + int(above.sum()), self.positive_below + int(below.sum())

    def _arrays(self) -> _Cells:
        values = self.cells.values
        number: dict[Hashable, int] = {}
        keys: list[tuple[Hashable, float]] = [key for key in self.cells.index if isinstance(key, tuple)]
        groups = np.array([-1 if g is None else number.setdefault(g, len(number)) for g, _ in keys], dtype=np.int64)
        rewards = np.array([reward for _, reward in keys], dtype=np.float64)
        rows = values[:, _ROWS]
        sizes, sums = sum_by_code(groups, np.column_stack([rows, rows * rewards]), len(number)).T
        everyone = groups < 0
        size = np.where(everyone, rows.sum(), sizes[groups] if len(number) else 0.0)
        with np.errstate(invalid="ignore"):  # an infinite reward leaves no baseline
            total = np.where(everyone, (rows * rewards).sum(), sums[groups] if len(number) else 0.0)
            advantage = rewards - total / np.maximum(size, 1)
            alone = size < 2
            size, total = np.where(alone, rows.sum(), size), np.where(alone, (rows * rewards).sum(), total)
            centred = rewards - (total - rewards) / np.maximum(size - 1, 1)
        return _Cells(values, rewards, groups, advantage, centred)


def _unclipped(batch: ScoreBatch) -> tuple[Floats, Floats, Floats]:
    """[rows] tokens with ratio above 1 + clip, below 1 - clip, and all; zeros without per-token values."""
    ratio = batch.tokens("ratio")
    if ratio is None:
        return np.zeros(batch.num_rows), np.zeros(batch.num_rows), np.zeros(batch.num_rows)
    outside = np.stack([ratio.values > 1 + PPO_CLIP, ratio.values < 1 - PPO_CLIP, np.ones(len(ratio.values))], axis=1)
    above, below, count = sum_by_code(ratio.rows, outside.astype(np.float64), batch.num_rows).T
    return above, below, count
