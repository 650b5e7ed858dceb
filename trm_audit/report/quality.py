"""What stands in the data and breaks no rule, yet makes every figure wrong: placeholders, padding, lists off by one.

Counted in the one pass over the shards; `findings` says it in words. Nothing here is a verdict on a sequence: the
limits are wide, so that sound data stay silent, and each is said beside its constant.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trm_audit.numerics.histogram import Moments
from trm_audit.numerics.ragged import Bools, Floats, Ints, segment_sum
from trm_audit.report.columns import ScoreBatch

if TYPE_CHECKING:
    from trm_audit.report.decode import TokenText

LONG_RUN = 8
"""Exact zeros in succession that are no accident."""
MANY_ZEROS = 0.3
"""Share of a sequence's tokens above which its exact zeros are no accident."""
UNSURE = -0.01
"""A trainer's log-probability below this contradicts a rollout's of exactly 0.0."""
CONTRADICTED = 0.1
"""Share of some zeros, and at least two, that the trainer must contradict: a policy that is sure has true zeros."""
IMPOSSIBLE_LOW, IMPOSSIBLE_HIGH = -1000.0, 1e-3
"""No sampled token has a log-probability at or below the one (-9999 stands for a missing value) or above the other."""
SHIFTED_ROW = 0.5
"""A shift fits better if it makes the mean distance smaller than this share of what it is as stored."""
SHIFT_PAIRS = 3
"""Pairs of neighbours, both sampled, that a sequence needs before it is tried with a shift."""
SAMPLE_SIZE = 256
"""Responses that are kept to be tokenized again."""
SHORTEST_SAMPLED = 8
"""Tokens of a response that is worth tokenizing again: a shorter one often survives."""


@dataclass
class QualityTotals:
    """Counts behind the findings; two halves of the data, added in any order, are the whole.

    Attributes:
        counts: sequences but for those named `*_tokens`. num_rows; num_logprobs: with a rollout log-probability;
            num_placeholders, placeholder_tokens; num_zero_tails; num_shift_tried, num_later, num_earlier: where the
            rollout's value of a token stands one place later or earlier; num_several_versions; num_checked,
            num_disagreeing, disagreeing_tokens; num_truncated: sampled with top-p or top-k; num_cut: and
                compared as distributions.
        kept, rejected: policy tokens of the sequences that have any, by verdict.
        sample: responses to tokenize again.
    """

    counts: Counter[str] = field(default_factory=Counter)
    kept: Moments = field(default_factory=Moments)
    rejected: Moments = field(default_factory=Moments)
    sample: ResponseSample = field(default_factory=lambda: ResponseSample())

    def add(self, batch: ScoreBatch, keep: Bools | None) -> None:
        """Add one batch; `keep` [rows] are the verdicts, None where nothing was decided.

        Raises:
            BadInput: per-token lists of a row differ in length.
        """
        disagreements = batch.filled("num_disagreements")
        truncated = (batch.filled("top_p") < 1) | (batch.filled("top_k") > 0)
        self.counts.update(
            num_rows=batch.num_rows,
            num_checked=int(np.count_nonzero(~np.isnan(disagreements))),
            num_disagreeing=int(np.count_nonzero(disagreements > 0)),
            disagreeing_tokens=int(np.nansum(disagreements)),
            num_truncated=int(np.count_nonzero(truncated)),
            num_cut=int(
                np.count_nonzero(truncated & (_equals(batch, "grade", "exact") | _equals(batch, "grade", "sketch")))
            ),
            num_several_versions=_several_versions(batch),
        )
        rollout = batch.aligned("rollout_logprobs")
        if rollout is not None:
            trainer = batch.aligned("trainer_logprobs")
            trainer = np.full(len(rollout), np.nan) if trainer is None else trainer
            self.counts.update(_placeholders(batch, rollout, trainer, truncated))
            self.counts.update(_shifts(batch, rollout, trainer))
        if keep is not None:
            tokens = batch.filled("num_tokens")
            self.kept.add(tokens[keep & (tokens > 0)])
            self.rejected.add(tokens[~keep & (tokens > 0)])
        self.sample.add(batch)

    def __add__(self, other: QualityTotals) -> QualityTotals:
        return QualityTotals(
            self.counts + other.counts,
            self.kept + other.kept,
            self.rejected + other.rejected,
            self.sample + other.sample,
        )

    def length_correlation(self) -> float:
        """Correlation of being rejected with the number of policy tokens (point-biserial); NaN where there is none."""
        kept, rejected, both = self.kept, self.rejected, self.kept + self.rejected
        if not kept.count or not rejected.count or not both.m2 > 0:
            return float("nan")
        shares = kept.count * rejected.count / both.count
        return (rejected.mean - kept.mean) * float(np.sqrt(shares / both.m2))


@dataclass
class ResponseSample:
    """The responses whose `rollout_id` have the smallest CRC-32: the same ones whatever order they come in.

    Attributes:
        responses: at most `SAMPLE_SIZE` of (CRC-32, rollout_id, token ids of the whole response), ascending; left out
            are those shorter than `SHORTEST_SAMPLED`, and those cut at the length limit, which have no end.
    """

    responses: list[tuple[int, str, list[int]]] = field(default_factory=list)

    def add(self, batch: ScoreBatch) -> None:
        """Add the rows of a batch that have an id and a response."""
        if not (batch.has("rollout_id") and batch.has("response_ids")):
            return
        lists = batch.batch.column("response_ids")
        if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
            return
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        names = batch.batch.column("rollout_id").cast(pa.string()).cast(pa.binary())
        whole = (lengths >= SHORTEST_SAMPLED) & ~_equals(batch, "finish_reason", "length")
        rows = np.flatnonzero(whole & np.asarray(names.is_valid()))
        ids = names.take(pa.array(rows)).to_pylist()
        hashes = np.fromiter(map(zlib.crc32, ids), np.int64, len(ids))
        chosen = np.flatnonzero(hashes <= self._limit(hashes))
        found = [(int(hashes[at]), ids[at].decode(), lists[int(rows[at])].as_py()) for at in chosen.tolist()]
        self.responses = _smallest(self.responses + found)

    def _limit(self, hashes: Ints) -> int:
        """The largest hash that may still be among the smallest."""
        limit = int(np.partition(hashes, SAMPLE_SIZE - 1)[SAMPLE_SIZE - 1]) if len(hashes) > SAMPLE_SIZE else 2**32
        return min(limit, self.responses[-1][0]) if len(self.responses) >= SAMPLE_SIZE else limit

    def __add__(self, other: ResponseSample) -> ResponseSample:
        return ResponseSample(_smallest(self.responses + other.responses))

    def are_text(self, tokenizer: TokenText) -> bool:
        """Whether all of them are what the tokenizer makes of their text, and none ends with a special token.

        What a model samples differs from that now and then (a third of real responses do), and mostly ends with one.
        A tokenizer of single characters always gives the same ids again, which says nothing.
        """
        responses = [ids for _, _, ids in self.responses]
        if any(None in ids or min(ids) < 0 or tokenizer.special(ids[-1]) for ids in responses):
            return False
        if all(len(tokenizer.text(token)) == 1 for token in set().union(*responses)):
            return False
        return all(tokenizer.retokenize(ids) == ids for ids in responses)


def _smallest(responses: Iterable[tuple[int, str, list[int]]]) -> list[tuple[int, str, list[int]]]:
    return sorted(responses, key=lambda entry: entry[:2])[:SAMPLE_SIZE]


def _several_versions(batch: ScoreBatch) -> int:
    """Rows whose `policy_version` is a list that changes from one policy token to another."""
    versions = batch.aligned("policy_version")
    if versions is None:
        return 0
    known = ~np.isnan(versions)
    rows, values = batch.policy_tokens.rows[known], versions[known]
    changed = (rows[1:] == rows[:-1]) & (values[1:] != values[:-1])
    return len(np.unique(rows[1:][changed]))


def _placeholders(batch: ScoreBatch, rollout: Floats, trainer: Floats, truncated: Bools) -> dict[str, int]:
    """Values that cannot be, and exact zeros that the trainer contradicts.

    A truncated sampler gives true zeros, where its nucleus is one token: in processed values, and in those that were
    rebuilt from full logits.
    """
    rows = batch.policy_tokens.rows
    impossible = (rollout <= IMPOSSIBLE_LOW) | (rollout > IMPOSSIBLE_HIGH)
    wrong = np.bincount(rows[impossible], minlength=batch.num_rows)
    normal = _equals(batch, "logprobs_mode", "processed") | (_equals(batch, "grade", "exact") & truncated)
    zeros = np.flatnonzero(rollout == 0)
    zeros = zeros[~normal[rows[zeros]]]
    tail = np.zeros(batch.num_rows, dtype=bool)
    if len(zeros):
        tail, more = _zeros(batch, zeros, trainer[zeros] < UNSURE)
        wrong = wrong + more
    with_values = np.bincount(rows[~np.isnan(rollout)], minlength=batch.num_rows)
    return {
        "num_logprobs": int(np.count_nonzero(with_values)),
        "num_placeholders": int(np.count_nonzero(wrong)),
        "placeholder_tokens": int(wrong.sum()),
        "num_zero_tails": int(np.count_nonzero(tail)),
    }


def _zeros(batch: ScoreBatch, zeros: Ints, unsure: Bools) -> tuple[Bools, Ints]:
    """Rows that end in a long run of zeros, and the zeros elsewhere in each row that are placeholders.

    Args:
        batch: the rows.
        zeros: [z] policy tokens with a log-probability of exactly 0.0, ascending.
        unsure: [z] the trainer contradicts it.

    A row of nothing but zeros has placeholders, not a tail.
    """
    rows = batch.policy_tokens.rows
    tokens = np.bincount(rows, minlength=batch.num_rows)
    ends = np.cumsum(tokens)
    first = np.ones(len(zeros), dtype=bool)
    first[1:] = (np.diff(zeros) != 1) | (np.diff(rows[zeros]) != 0)
    starts = np.flatnonzero(first)
    lengths = np.diff(np.append(starts, len(zeros)))
    doubted = np.add.reduceat(unsure.astype(np.int64), starts)
    row = rows[zeros[starts]]
    long = (lengths >= LONG_RUN) & _contradicted(doubted, lengths)
    tail = long & (zeros[starts] + lengths == ends[row]) & (lengths < tokens[row])
    size = batch.num_rows
    found, in_doubt, in_runs = (
        np.bincount(row[chosen], weights=of[chosen], minlength=size).astype(np.int64)
        for of, chosen in ((lengths, ~tail), (doubted, ~tail), (lengths, long & ~tail))
    )
    many = (found > MANY_ZEROS * tokens) & _contradicted(in_doubt, found)
    return np.bincount(row[tail], minlength=size) > 0, np.where(many, found, in_runs)


def _contradicted(doubted: Ints, of: Ints) -> Bools:
    enough: Bools = doubted >= np.maximum(2, CONTRADICTED * of)
    return enough


def _shifts(batch: ScoreBatch, rollout: Floats, trainer: Floats) -> dict[str, int]:
    """Rows that were tried with the rollout's values one token later and earlier, and those that fit better so.

    Compared are mean distances at the same trainer values, over neighbours that both were sampled.
    """
    where = batch.policy_tokens
    usable = (np.abs(rollout) < -IMPOSSIBLE_LOW) & (np.abs(trainer) < -IMPOSSIBLE_LOW)
    a, b = np.where(usable, rollout, 0.0), np.where(usable, trainer, 0.0)
    offsets = np.zeros(batch.num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(where.rows, minlength=batch.num_rows), out=offsets[1:])
    pair = np.zeros(len(a))  # 1.0 where a token and the next one are neighbours; the last one has no next
    pair[:-1] = (where.rows[1:] == where.rows[:-1]) & (where.indices[1:] - where.indices[:-1] == 1)
    pair[:-1] *= usable[1:] & usable[:-1]
    distance = np.zeros(len(a))

    def total(of_trainer: Floats, of_rollout: Floats) -> Floats:
        """[rows] sum of the distances over the pairs; a buffer used again, as fresh memory costs more than the sum."""
        np.subtract(of_trainer, of_rollout, out=distance[:-1])
        np.abs(distance, out=distance)
        return segment_sum(np.multiply(distance, pair, out=distance), offsets)

    tried = segment_sum(pair, offsets) >= SHIFT_PAIRS
    later = total(b[:-1], a[1:]) < SHIFTED_ROW * total(b[:-1], a[:-1])
    earlier = total(b[1:], a[:-1]) < SHIFTED_ROW * total(b[1:], a[1:])
    return {
        "num_shift_tried": int(np.count_nonzero(tried)),
        "num_later": int(np.count_nonzero(tried & later)),
        "num_earlier": int(np.count_nonzero(tried & earlier)),
    }


def _equals(batch: ScoreBatch, name: str, value: str) -> Bools:
    """[rows] True where a column has the value; nowhere without it."""
    keys, codes = batch.codes(name)
    return codes == keys.index(value) if value in keys else np.zeros(batch.num_rows, dtype=bool)
