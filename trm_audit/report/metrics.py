"""Figures that training logs show too, with bootstrap intervals over groups.

Every figure is a function of means, and every mean a sum over a count, kept for each cluster: the rollouts of one
prompt, or one rollout where there are no groups. Where another project logs the same quantity, its name stands beside
ours; projects that average over micro-batches or processes first weigh those alike, not the tokens in them.
Nothing is clamped here; where a project clamps, the two are equal as long as nothing is that large.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

from trm_audit.numerics.bootstrap import cluster_bootstrap
from trm_audit.numerics.ragged import Bools, Floats, Ints
from trm_audit.report.blocks import Metric
from trm_audit.report.columns import ScoreBatch

NUM_BUCKETS = 1 << 16
"""Groups are told apart by so many values of a hash, and memory does not grow with their number. Those that share one
are drawn together: still independent of all others, so the intervals stay valid, but counted as one cluster (of 1000
groups about 8)."""

_MEAN = "mean over tokens of "
_SEQ = "mean over sequences of "
_SURE = "rigorous or, from sketches, at their confidence for a sequence"

DEFINITIONS: dict[str, tuple[str, dict[str, str]]] = {
    "mean_kl": (_MEAN + "the exact KL(rollout || trainer)", {}),
    "mean_kl_reverse": (_MEAN + "the exact KL(trainer || rollout)", {}),
    "mean_tv": (_MEAN + "the exact total variation distance", {}),
    "mean_kl_estimate": (_MEAN + "the estimate of KL(rollout || trainer) from sketches", {}),
    "mean_kl_lower": (_MEAN + "the lower bound of KL(rollout || trainer), " + _SURE, {}),
    "mean_kl_upper": (_MEAN + "the upper bound of KL(rollout || trainer), " + _SURE, {}),
    "mean_tv_lower": (_MEAN + "the certain lower bound of the total variation distance", {}),
    "mean_tv_upper": (_MEAN + "the upper bound of the total variation distance, " + _SURE, {}),
    "mean_k1": (_MEAN + "k1 = -log_ratio", {"verl": "rollout_corr/kl", "OpenRLHF": "vllm_kl"}),
    "mean_k2": (_MEAN + "k2 = log_ratio^2 / 2", {}),
    "mean_k3": (
        _MEAN + "k3 = ratio - 1 - log_ratio",
        {"verl": "rollout_corr/k3_kl", "prime-rl": "mismatch_kl/all/mean", "NeMo-RL": "train/gen_kl_error"},
    ),
    "mean_seq_mean_k3": (
        _SEQ + "seq_mean_k3, the mean k3 of each (miles clamps k3 at 10; prime-rl: older releases)",
        {"miles": "train/train_rollout_kl", "prime-rl": "mismatch_kl/mean"},
    ),
    "mean_abs_log_ratio": (_MEAN + "|log_ratio|", {"TRL": "sampling/sampling_logp_difference/mean"}),
    "mean_seq_mean_abs_log_ratio": (
        _SEQ + "seq_mean_abs_log_ratio, the mean |log_ratio| of each",
        {"slime": "train/train_rollout_logprob_abs_diff", "miles": "train/train_rollout_logprob_abs_diff"},
    ),
    "max_abs_log_ratio": ("largest |log_ratio| of any token", {"TRL": "sampling/sampling_logp_difference/max"}),
    "mean_exp_abs_log_ratio": (_MEAN + "exp(|log_ratio|)", {"NeMo-RL": "train/token_mult_prob_error"}),
    "mean_abs_probability_difference": (
        _MEAN + "|trainer probability - rollout probability| of the sampled token",
        {"verl": "training/rollout_probs_diff_mean"},
    ),
    "mean_ratio": (_MEAN + "ratio; 1 where the rollout policy is the one that was sampled from", {}),
    "ess_token": ("effective sample size of the tokens' ratios, (sum ratio)^2 / (n sum ratio^2)", {}),
    "ess_seq": ("effective sample size of the sequences' weights w = exp(sum log_ratio), (sum w)^2 / (n sum w^2)", {}),
    "chi2_token": (
        _MEAN + "ratio^2, minus 1 (verl clamps log_ratio at 20)",
        {"verl": "rollout_corr/chi2_token"},
    ),
    "chi2_seq": (
        _SEQ + "exp(2 sum log_ratio), minus 1 (verl clamps the sum at 20)",
        {"verl": "rollout_corr/chi2_seq"},
    ),
    "rollout_perplexity": (_SEQ + "exp(-mean rollout log-probability)", {"verl": "rollout_corr/rollout_ppl"}),
    "trainer_perplexity": (_SEQ + "exp(-mean trainer log-probability)", {"verl": "rollout_corr/training_ppl"}),
    "ppl_ratio": (_SEQ + "exp(-seq_mean_log_ratio)", {"verl": "rollout_corr/ppl_ratio"}),
    "log_ppl_difference": (
        _SEQ + "-seq_mean_log_ratio: above 0 where the trainer finds the responses less likely",
        {"verl": "rollout_corr/log_ppl_diff"},
    ),
    "abs_log_ppl_difference": (_SEQ + "|seq_mean_log_ratio|", {"verl": "rollout_corr/log_ppl_abs_diff"}),
    "acceptance": ("share of the sequences that are kept", {}),
}
"""Name -> (definition, project -> the name it logs the same quantity by), in the order of the report.

Read in the projects' sources. verl's `rollout_is_eff_sample_size` is not `ess_token`: it truncates the ratios first.
"""

_DIVERGENCES = ("kl", "kl_reverse", "tv", "kl_estimate", "kl_lower", "kl_upper", "tv_lower", "tv_upper")
_ESTIMATES = ("k1", "k2", "k3", "abs_log_ratio", "ratio")
_TOKEN_MEANS = {f"mean_{name}": name for name in (*_DIVERGENCES, *_ESTIMATES)}
_BASIS = {
    "max_abs_log_ratio": "mean_abs_log_ratio",
    "ess_token": "token_weight",
    "chi2_token": "token_weight",
    "ess_seq": "seq_weight",
    "chi2_seq": "seq_weight",
}
"""Figures that are no means -> the mean whose count is theirs."""
_HIDDEN = ("token_weight", "token_weight_squared", "seq_weight", "seq_weight_squared", "seq_log_scale")
_MEANS = (*(name for name in DEFINITIONS if name not in _BASIS), *_HIDDEN)
_AT = {name: 2 * at for at, name in enumerate(_MEANS)}

Part = tuple[Floats, Floats]
"""Per row [rows] the sum of a quantity and how many values are in it; (0, 0) where the row has none."""


class MetricTotals:
    """Sums and counts of every mean, by cluster.

    Weights of whole sequences are products of ratios and leave the range of float64. They are kept as exp(w - scale),
    scale the largest finite w = seq_sum_log_ratio so far; when a larger one comes, what is there is scaled down.
    """

    def __init__(self) -> None:
        self._keys: Ints = np.zeros(0, dtype=np.int64)
        self._sums = np.zeros((64, 2 * len(_MEANS)))  # [at least len(_keys), m]
        self._row_of_key = np.full(2 * NUM_BUCKETS, -1)
        self._num_unnamed = 0
        self._log_scale = -math.inf
        self._largest = -math.inf

    def add(self, batch: ScoreBatch, keep: Bools | None) -> None:
        """Add one batch; `keep` [rows] are the verdicts, None where nothing was decided."""
        keys, codes = np.unique(self._buckets(batch), return_inverse=True)
        sums = np.zeros((len(keys), 2 * len(_MEANS)))
        with np.errstate(over="ignore", invalid="ignore"):
            for name, part in (_parts(batch, keep) | self._weights(batch)).items():
                for offset, values in enumerate(part):
                    sums[:, _AT[name] + offset] = np.bincount(codes, weights=values, minlength=len(keys))
            self._add_sums(keys, sums)
        self._largest = max(self._largest, _largest_distance(batch))

    def __add__(self, other: MetricTotals) -> MetricTotals:
        merged = MetricTotals()
        merged._log_scale = max(self._log_scale, other._log_scale)
        merged._largest = max(self._largest, other._largest)
        merged._num_unnamed = self._num_unnamed + other._num_unnamed
        for part, before in ((self, 0), (other, self._num_unnamed)):
            keys, sums = part.clusters()
            unnamed = keys >= NUM_BUCKETS
            keys[unnamed] = NUM_BUCKETS + (keys[unnamed] + before) % NUM_BUCKETS
            with np.errstate(invalid="ignore"):
                merged._add_sums(keys, _scaled(sums, part._log_scale, merged._log_scale))
        return merged

    def clusters(self) -> tuple[Ints, Floats]:
        """Keys [c], ascending, and sums [c, m]: what `statistics` is computed from. Independent of the rows' order."""
        order = np.argsort(self._keys)
        return self._keys[order], self._sums[order]

    def finish(self) -> dict[str, Metric]:
        """The figures that the data have, in the order of `DEFINITIONS`."""
        _, sums = self.clusters()
        with np.errstate(invalid="ignore"):
            totals = sums.sum(axis=0)
        values = statistics(totals) | {"max_abs_log_ratio": np.float64(self._largest)}
        intervals = cluster_bootstrap(sums, statistics)
        out = {}
        for name, (definition, elsewhere) in DEFINITIONS.items():
            count = _AT[_BASIS.get(name, name)] + 1
            if totals[count] > 0:
                low, high = intervals.get(name, (math.nan, math.nan))
                clusters = int(np.count_nonzero(sums[:, count]))
                n = int(totals[count])
                out[name] = Metric(float(values[name]), low, high, n, clusters, definition, dict(elsewhere))
        return out

    def _add_sums(self, keys: Ints, sums: Floats) -> None:
        """Add `sums` [c, m] to what the distinct `keys` [c] have."""
        new = keys[self._row_of_key[keys] < 0]
        self._row_of_key[new] = len(self._keys) + np.arange(len(new))
        self._keys = np.concatenate([self._keys, new])
        if len(self._keys) > len(self._sums):
            self._sums = np.concatenate([self._sums, np.zeros((2 * len(self._keys), sums.shape[1]))])
        self._sums[self._row_of_key[keys]] += sums

    def _buckets(self, batch: ScoreBatch) -> Ints:
        """[rows] the cluster: hash of the group, of the rollout without one, and a running number without either."""
        out = np.full(batch.num_rows, -1, dtype=np.int64)
        for column in ("group_id", "rollout_id"):
            if (out < 0).any():
                values, codes = batch.codes(column)
                hashes = np.array([zlib.crc32(str(value).encode()) % NUM_BUCKETS for value in values], dtype=np.int64)
                chosen = (out < 0) & (codes >= 0)
                out[chosen] = hashes[codes[chosen]]
        unnamed = np.flatnonzero(out < 0)
        out[unnamed] = NUM_BUCKETS + (self._num_unnamed + np.arange(len(unnamed))) % NUM_BUCKETS
        self._num_unnamed += len(unnamed)
        return out

    def _weights(self, batch: ScoreBatch) -> dict[str, Part]:
        """Scaled weights of whole sequences, their squares and the scale; what is there follows to a new scale."""
        logarithms = _row_sums(batch, "log_ratio")
        known = ~np.isnan(logarithms)
        scale = max(self._log_scale, float(logarithms[np.isfinite(logarithms)].max(initial=-np.inf)))
        self._sums = _scaled(self._sums, self._log_scale, scale)
        self._log_scale = scale
        reference = scale if scale > -math.inf else 0.0
        weights = np.where(known, np.exp(logarithms - reference), 0.0)
        number = known.astype(np.float64)
        return {
            "seq_weight": (weights, number),
            "seq_weight_squared": (weights * weights, number),
            "seq_log_scale": (reference * number, number),
        }


def statistics(sums: Floats) -> dict[str, Floats]:
    """Every figure but the maximum: sums [..., m] over any clusters -> name -> [...], NaN where there is no value."""
    with np.errstate(all="ignore"):
        mean = {name: sums[..., at] / sums[..., at + 1] for name, at in _AT.items()}
        out = {name: mean[name] for name in _MEANS if name not in _HIDDEN}
        out["ess_token"] = mean["token_weight"] ** 2 / mean["token_weight_squared"]
        out["ess_seq"] = mean["seq_weight"] ** 2 / mean["seq_weight_squared"]
        out["chi2_token"] = mean["token_weight_squared"] - 1
        out["chi2_seq"] = np.exp(2 * mean["seq_log_scale"] + np.log(mean["seq_weight_squared"])) - 1
    return out


def _parts(batch: ScoreBatch, keep: Bools | None) -> dict[str, Part]:
    parts = {metric: _token_part(batch, name) for metric, name in _TOKEN_MEANS.items()}
    ratio, distance = batch.aligned("ratio"), batch.aligned("abs_log_ratio")
    parts["token_weight"] = _sum_rows(batch, ratio)
    parts["token_weight_squared"] = _sum_rows(batch, None if ratio is None else ratio * ratio)
    parts["mean_exp_abs_log_ratio"] = _sum_rows(batch, None if distance is None else np.exp(distance))
    rollout, trainer = batch.aligned("rollout_logprobs"), batch.aligned("trainer_logprobs")
    if rollout is not None and trainer is not None:
        difference = np.abs(np.exp(trainer) - np.exp(rollout))
        parts["mean_abs_probability_difference"] = _sum_rows(batch, difference)
    parts["rollout_perplexity"] = _row_part(np.exp(-_divided(*_sum_rows(batch, rollout))))
    parts["trainer_perplexity"] = _row_part(np.exp(-_divided(*_sum_rows(batch, trainer))))
    log_ratio = _row_means(batch, "log_ratio")
    parts["ppl_ratio"] = _row_part(np.exp(-log_ratio))
    parts["log_ppl_difference"] = _row_part(-log_ratio)
    parts["abs_log_ppl_difference"] = _row_part(np.abs(log_ratio))
    for name in ("k3", "abs_log_ratio"):
        parts[f"mean_seq_mean_{name}"] = _row_part(_row_means(batch, name))
    if keep is not None:
        parts["acceptance"] = _row_part(keep.astype(np.float64))
    return parts


def _token_part(batch: ScoreBatch, name: str) -> Part:
    """Sum over the tokens of each row: the stored `seq_sum_*` where the columns are there, otherwise from the list."""
    totals, counts = batch.floats(f"seq_sum_{name}"), batch.floats("num_tokens")
    if totals is None or counts is None:
        return _sum_rows(batch, batch.aligned(name))
    known = ~np.isnan(totals) & (counts > 0)
    return np.where(known, totals, 0.0), np.where(known, counts, 0.0)


def _row_sums(batch: ScoreBatch, name: str) -> Floats:
    """[rows] `seq_sum_*`, from the list where there is no such column; NaN where a row has none."""
    column = batch.floats(f"seq_sum_{name}")
    if column is not None:
        return column
    totals, counts = _sum_rows(batch, batch.aligned(name))
    return np.where(counts > 0, totals, np.nan)


def _row_means(batch: ScoreBatch, name: str) -> Floats:
    """[rows] `seq_mean_*`, likewise."""
    column = batch.floats(f"seq_mean_{name}")
    return column if column is not None else _divided(*_sum_rows(batch, batch.aligned(name)))


def _sum_rows(batch: ScoreBatch, values: Floats | None) -> Part:
    """Sum over the tokens of each row of an aligned quantity, NaN left out."""
    if values is None:
        return np.zeros(batch.num_rows), np.zeros(batch.num_rows)
    rows, known = batch.policy_tokens.rows, ~np.isnan(values)
    if not known.all():
        rows, values = rows[known], values[known]
    totals: Floats = np.bincount(rows, weights=values, minlength=batch.num_rows).astype(np.float64)  # of [] it is int
    return totals, np.bincount(rows, minlength=batch.num_rows).astype(np.float64)


def _divided(totals: Floats, counts: Floats) -> Floats:
    """[rows] means, NaN where nothing was counted."""
    out: Floats = np.divide(totals, counts, out=np.full(len(totals), np.nan), where=counts > 0)
    return out


def _row_part(values: Floats) -> Part:
    """One value for each row, NaN left out."""
    known = ~np.isnan(values)
    return np.where(known, values, 0.0), known.astype(np.float64)


def _largest_distance(batch: ScoreBatch) -> float:
    """Largest |log_ratio| of the batch, -inf of none."""
    column = batch.floats("seq_max_abs_log_ratio")
    values = column if column is not None else batch.aligned("abs_log_ratio")
    return -math.inf if values is None else float(np.fmax.reduce(values, initial=-np.inf))


def _scaled(sums: Floats, old: float, new: float) -> Floats:
    """The same sums with the sequences' weights relative to exp(new) instead of exp(old).

    At old = -inf there were no weights but 0 and inf, which stay; no factor is so small that it makes NaN of inf.
    """
    if new == old:
        return sums
    out = sums.copy()
    if old > -math.inf:
        out[:, _AT["seq_weight"]] *= max(math.exp(old - new), math.ulp(0.0))
        out[:, _AT["seq_weight_squared"]] *= max(math.exp(2 * (old - new)), math.ulp(0.0))
    out[:, _AT["seq_log_scale"]] = new * out[:, _AT["seq_log_scale"] + 1]
    return out
