"""One pass over score or training shards, batch by batch, into totals that merge.

    builder = SummaryBuilder(Thresholds(delta_max=0.05))
    for batch in batches:
        builder.add(batch)
    summary = builder.finish()

Two builders over two halves of the data, added, are the builder over the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trm_audit.errors import UsageError
from trm_audit.numerics.histogram import LogHistogram, PairCounts
from trm_audit.numerics.ragged import Bools, Floats
from trm_audit.report.bins import GroupTotals, RoutingTotals, TokenBinTotals, TokenIdTotals
from trm_audit.report.breakdown import CategoryTotals, categories
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.decode import TokenText
from trm_audit.report.deltas import DeltaTotals
from trm_audit.report.distributions import ProbabilityTotals
from trm_audit.report.finish import Settings, summarize
from trm_audit.report.impulses import ImpulseTotals
from trm_audit.report.lengths import LengthTotals
from trm_audit.report.metrics import MetricTotals
from trm_audit.report.quality import QualityTotals
from trm_audit.report.rewards import RewardTotals
from trm_audit.report.summary import AuditSummary, Thresholds
from trm_audit.report.totals import EVIDENCE, ClusterTotals, DivergenceTotals, evidence_rows, merged
from trm_audit.report.widths import WidthTotals
from trm_audit.report.worst import WorstTotals
from trm_audit.rollout import DIVERGENCES, SAMPLED_DIVERGENCES, TOKEN_SCORES

PAIR_DELTAS = np.array([float(f"{m}e{e}") for e in range(-6, 1) for m in (1, 2, 5)] + [10.0])
"""Thresholds of the combined criterion, in both directions."""
BREAKDOWNS = ("engine", "policy_version", "staleness")
PARTS = (
    "rewards",
    "quality",
    "metrics",
    "probabilities",
    "deltas",
    "lengths",
    "bins",
    "token_ids",
    "by_group",
    "routing",
    "impulses",
    "widths",
    "worst",
)
"""Accumulators that take every batch, each the source of the block of its name."""

_GRADES_OF = {
    "seq_sum_kl": ("exact",),
    "seq_sum_kl_estimate": ("sketch",),
    "seq_sum_kl_lower": ("sketch", "interval"),
    "seq_sum_kl_upper": ("sketch", "interval"),
    "seq_sum_k3": ("sampled",),
}
"""Totals of a sequence -> the kinds of evidence that give them."""
_CLUSTERED = (*_GRADES_OF, "violation")
_TOKEN_QUANTITIES = tuple(dict.fromkeys((*SAMPLED_DIVERGENCES, *TOKEN_SCORES[1:])))


class SummaryBuilder:
    """Accumulates score or training shards and turns them into an `AuditSummary`.

    Args:
        thresholds: the criteria's numbers, for violations and token masking.
        criteria: the criteria in words, shown in the report.
    """

    def __init__(self, thresholds: Thresholds | None = None, criteria: Sequence[str] = ()) -> None:
        self.thresholds = thresholds or Thresholds()
        self.criteria = list(criteria)
        self.counts: Counter[str] = Counter()
        self.grades: Counter[str] = Counter()
        self.audited_policies: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.longest = 0
        self.largest_compared = -np.inf
        self.tokens: dict[str, LogHistogram] = {}
        self.sequences: dict[str, LogHistogram] = {}
        self.pairs: dict[tuple[str, str], PairCounts] = {}
        self.evidence: dict[tuple[str, str], DivergenceTotals] = {}
        self.clusters = ClusterTotals(_CLUSTERED)
        self.rewards = RewardTotals()
        self.breakdowns: dict[str, CategoryTotals] = {}
        self.quality = QualityTotals()
        self.metrics = MetricTotals()
        self.probabilities = ProbabilityTotals()
        self.deltas = DeltaTotals(self.thresholds)
        self.lengths = LengthTotals(self.thresholds)
        self.bins = TokenBinTotals()
        self.token_ids = TokenIdTotals()
        self.by_group = GroupTotals()
        self.routing = RoutingTotals()
        self.impulses = ImpulseTotals()
        self.widths = WidthTotals()
        self.worst = WorstTotals(self.thresholds)

    def add(self, record_batch: pa.RecordBatch) -> None:
        """Add one batch of a score shard or a training shard; any subset of their columns will do.

        A column `keep` (and `reason`) is the verdict on each row.

        Raises:
            BadInput: per-token lists of a row differ in length.
        """
        if not record_batch.num_rows:
            return
        batch = ScoreBatch(record_batch)
        keep = self._keep(batch)
        self._count(batch, keep)
        self._spread(batch)
        self._accept(batch)
        self._compare(batch)
        self._bound(batch, keep)
        for name in PARTS:
            getattr(self, name).add(batch, keep)
        for column in BREAKDOWNS:
            found = categories(batch, column)
            if found is not None:
                self.breakdowns.setdefault(column, CategoryTotals()).add(batch, *found, keep)

    def __add__(self, other: SummaryBuilder) -> SummaryBuilder:
        if self.thresholds != other.thresholds:
            raise UsageError(
                "Two summaries with different thresholds cannot be added", next_step="Build both with the same."
            )
        both = SummaryBuilder(self.thresholds, self.criteria)
        both.longest = max(self.longest, other.longest)
        both.largest_compared = max(self.largest_compared, other.largest_compared)
        for name in ("counts", "grades", "audited_policies", "reasons", "clusters", *PARTS):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        for name in ("tokens", "sequences", "pairs", "evidence", "breakdowns"):
            setattr(both, name, merged(getattr(self, name), getattr(other, name)))
        return both

    def finish(
        self,
        *,
        horizon: int | None = None,
        reward_range: float | None = None,
        target_acceptance: float | None = None,
        tokenizer: TokenText | None = None,
        num_skipped: int = 0,
        num_dropped: int = 0,
        runs: Sequence[Mapping[str, Any]] = (),
        limits: Sequence[tuple[str, float]] = (),
    ) -> AuditSummary:
        """The summary of what was added so far.

        Args:
            horizon: T of the bounds, in policy tokens; the longest response if None.
            reward_range: R_max - R_min; if None 1 where all rewards lie in [0, 1], otherwise what was observed.
            target_acceptance: share of sequences for which to name thresholds, in (0, 1].
            tokenizer: shows tokens as text.
            num_skipped: rows that scoring left out, from the shards' counts.
            num_dropped: rejected rows that filtering removed (`n_total` minus the rows of the training shards); they
                count in N.
            runs: what scored the rollouts, from the footer of each shard.
            limits: column -> largest value that the criteria keep, to compare with the noise floor of those runs.

        Raises:
            UsageError: the horizon is shorter than the longest response.
            BadInput: a run's noise floor cannot be read.
        """
        found = Settings(
            horizon, reward_range, target_acceptance, tokenizer, num_skipped, num_dropped, tuple(runs), tuple(limits)
        )
        return summarize(self, found)

    def _keep(self, batch: ScoreBatch) -> Bools | None:
        return batch.filled("keep") == 1 if batch.has("keep") else None

    def _count(self, batch: ScoreBatch, keep: Bools | None) -> None:
        tokens = batch.filled("num_tokens")
        self.longest = max(self.longest, int(np.nan_to_num(tokens).max()))
        self.counts.update(
            n_total=batch.num_rows,
            num_tokens=int(np.nansum(tokens)),
            num_without_policy_tokens=int(batch.empty().sum()),
            num_disagreements=int(np.nansum(batch.filled("num_disagreements"))),
            num_infinite=int(np.nansum(batch.filled("num_infinite"))),
            num_grouped=int((batch.codes("group_id")[1] >= 0).sum()),
            num_decided=0 if keep is None else batch.num_rows,
            n_kept=0 if keep is None else int(keep.sum()),
        )
        for counter, name in ((self.grades, "grade"), (self.audited_policies, "audited_policy")):
            values, codes = batch.codes(name)
            for value, count in zip(values, np.bincount(codes + 1, minlength=len(values) + 1)[1:], strict=True):
                counter.update({str(value): int(count)} if count else {})
        if batch.has("reason"):
            joined = batch.batch.column("reason").cast(pa.string())
            causes = pc.extract_regex(pc.split_pattern(joined, "; ").flatten(), r"^(?P<cause>[^(]*)")
            for entry in pc.value_counts(causes.drop_null().field("cause")).to_pylist():
                self.reasons[entry["values"]] += entry["counts"]

    def _spread(self, batch: ScoreBatch) -> None:
        for name in _TOKEN_QUANTITIES:
            column = batch.tokens(name)
            if column is not None and len(column.values):
                self.tokens.setdefault(name, LogHistogram()).add(column.values)
        for name in (f"seq_{kind}_{divergence}" for kind in ("max", "mean", "sum") for divergence in DIVERGENCES):
            values = batch.floats(name)
            if values is not None and not np.isnan(values).all():
                self.sequences.setdefault(name, LogHistogram()).add(values[~np.isnan(values)])

    def _accept(self, batch: ScoreBatch) -> None:
        """Pairs of a largest and a mean divergence, for the combined criterion."""
        chosen = (self.thresholds.max_of, self.thresholds.avg_of)
        for max_of, avg_of in dict.fromkeys([("kl", "kl"), ("kl_estimate", "kl_estimate"), ("k2", "k3"), chosen]):
            largest, mean = batch.floats(f"seq_max_{max_of}"), batch.floats(f"seq_mean_{avg_of}")
            if max_of and avg_of and largest is not None and mean is not None:
                known = ~np.isnan(largest) & ~np.isnan(mean)
                if known.any():
                    counts = self.pairs.setdefault((max_of, avg_of), PairCounts(PAIR_DELTAS, PAIR_DELTAS))
                    counts.add(largest[known], mean[known])

    def _compare(self, batch: ScoreBatch) -> None:
        """D_seq by prompt, and what lies above delta_max: sequences, prompts, tokens."""
        values = {name: self._sequence_sum(batch, name) for name in _GRADES_OF}
        values["violation"] = np.full(batch.num_rows, np.nan)
        delta = self.thresholds.delta_max
        if delta is not None:
            largest = batch.filled(f"seq_max_{self.thresholds.max_of or 'kl'}")
            if self.thresholds.max_of in (None, "kl"):
                largest = np.where(np.isnan(largest), batch.filled("seq_max_kl_estimate"), largest)
            if self.thresholds.max_of is None:
                vetoed = np.fmax(batch.filled("seq_max_k2"), batch.filled("seq_max_kl_lower"))
                largest = np.where(np.isnan(largest), vetoed, largest)
            known = ~np.isnan(largest)
            values["violation"] = np.where(known, (largest > delta).astype(np.float64), np.nan)
            self.largest_compared = max(self.largest_compared, float(np.fmax.reduce(largest)))
            self.counts.update(num_compared=int(known.sum()), num_violations=int((largest > delta).sum()))
            self._mask_tokens(batch, delta)
        self.clusters.add(batch, values)

    def _sequence_sum(self, batch: ScoreBatch, name: str) -> Floats:
        """[rows] a `seq_sum_*`; 0 for the rows without policy tokens that belong to its evidence."""
        values = batch.filled(name)
        members = np.any([evidence_rows(batch, grade) for grade in _GRADES_OF[name]], axis=0)
        return np.where(np.isnan(values) & batch.empty() & members, 0.0, values)

    def _mask_tokens(self, batch: ScoreBatch, delta: float) -> None:
        """Tokens that token masking would compare and drop, each by the divergence that decides its row."""
        decided = np.zeros(batch.num_rows, dtype=bool)
        named = self.thresholds.max_of
        for name in {None: ("kl", "kl_estimate", "k2"), "kl": ("kl", "kl_estimate")}.get(named, (str(named),)):
            column = batch.tokens(name)
            if column is not None:
                values = column.values[~decided[column.rows]]
                self.counts.update(num_maskable=len(values), num_token_masked=int((values > delta).sum()))
            decided |= ~np.isnan(batch.filled(f"seq_max_{name}"))

    def _bound(self, batch: ScoreBatch, keep: Bools | None) -> None:
        for name, evidence in EVIDENCE.items():
            members = evidence_rows(batch, name)
            for subset, chosen in (("all", members), ("kept", members & keep if keep is not None else None)):
                if chosen is not None and chosen.any():
                    self.evidence.setdefault((subset, name), DivergenceTotals()).add(batch, evidence, chosen)
