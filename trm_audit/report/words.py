"""The report's sentences: the verdict, the notes, what a number rests on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from trm_audit.report.shown import percent
from trm_audit.report.summary import BoundsBlock, Counts, Quantiles, Thresholds

PLUG_IN = (
    "Only the contexts that were sampled were seen: a maximum over them is a lower bound of the theory's maximum over "
    "all reachable contexts, so every error bound here is a plug-in estimate."
)
CONDITIONAL = (
    "Dropping sequences does not lower the theory's maximum: a bound computed on kept sequences is conditional on what "
    "was kept."
)
TOKEN_MASKING = (
    "Masking single tokens leaves seq_max as it was: the tokens stay in the contexts on which the bounds rest."
)
K3_BIAS = (
    "k3 is unbiased only where the ratio's expectation is 1; a truncating sampler (top-p, top-k) breaks that. Read it "
    "beside the mean ratio."
)
PROMPTS = (
    "Rollouts of one prompt are dependent: the upper limit for prompts speaks of prompts like these, the one for "
    "sequences of these prompts only."
)
INTERVALS = (
    "Where only an interval is known, exact KL would keep between the share that kl_upper keeps and the share that "
    "kl_lower keeps."
)
MIXED = "Rows differ in grade: exact and estimated figures stand apart and cover different rows."


def verdict(counts: Counts, sequences: dict[str, Quantiles], n_kept: int | None, criteria: list[str]) -> str:
    """The outcome in one sentence, for somebody who reads no further."""
    if not counts.n_total:
        return "No rollouts were read."
    far = _farthest(sequences)
    sequences_of_all = f"{counts.n_total:,} sequence{'s' * (counts.n_total != 1)}"
    if n_kept is None:
        return f"{sequences_of_all} read, nothing decided (no thresholds given). {far}".rstrip()
    share = f"{n_kept:,} of {sequences_of_all} kept ({percent(n_kept / counts.n_total)})"
    return f"{share}{': ' + '; '.join(criteria) if criteria else ''}. {far}".rstrip()


def _farthest(sequences: dict[str, Quantiles]) -> str:
    for name, words in (
        ("kl", "Largest exact KL"),
        ("kl_lower", "Largest KL is at least"),
        ("k2", "Largest k2 of a sampled token"),
    ):
        spread = sequences.get(f"seq_max_{name}")
        if spread is not None:
            return f"{words} {spread.max:.4g} nats."
    return ""


def notes(counts: Counts, bounds: dict[str, dict[str, BoundsBlock]], compared: bool, sampled: bool) -> list[str]:
    """What the numbers do and do not claim; only what applies.

    Args:
        counts: what was read.
        bounds: subset -> evidence -> block.
        compared: sequences were compared with delta_max.
        sampled: k3 statistics are there.
    """
    said = [
        (PLUG_IN, bool(bounds)),
        (CONDITIONAL, "kept" in bounds),
        (TOKEN_MASKING, compared),
        (K3_BIAS, sampled),
        (PROMPTS, compared and counts.num_groups is not None),
        (INTERVALS, "interval" in counts.grades),
        (MIXED, len(counts.grades) > 1),
    ]
    return [sentence for sentence, applies in said if applies]


def run_notes(differing: Sequence[str]) -> list[str]:
    """That the shards were not all scored alike; `differing` are the settings in which they are not."""
    named = f"The shards were scored by runs that differ in {', '.join(differing)}; the first is shown."
    return [named] if differing else []


def deciding(thresholds: Thresholds, grades: Collection[str]) -> str:
    """Name of the statistic that delta_max is compared with in rows of these grades."""
    if thresholds.max_of:
        return f"seq_max_{thresholds.max_of}"
    if set(grades) == {"exact"}:
        return "seq_max_kl"
    sampled = "the larger of seq_max_k2 and seq_max_kl_lower" if "interval" in grades else "seq_max_k2"
    return f"seq_max_kl where exact, {sampled} elsewhere" if "exact" in grades or not grades else sampled


def interval_method(num_groups: int, num_singles: int) -> str:
    """How an interval of a mean counts its independent units."""
    if not num_groups:
        return f"95 %, {num_singles} sequences taken as independent"
    alone = f" and {num_singles} sequences without one" if num_singles else ""
    return f"95 %, cluster-robust by group_id ({num_groups} groups{alone})"


def evidence_label(label: str, subset: str) -> str:
    """What a block of bounds rests on."""
    return f"{label}; conditional on the kept sequences" if subset == "kept" else label
