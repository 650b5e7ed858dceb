"""The report's sentences: the verdict, the notes, what a number rests on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from trm_audit.report.shown import percent
from trm_audit.report.summary import BoundsBlock, BoundWidths, Counts, Quantiles, Thresholds
from trm_audit.report.totals import EVIDENCE

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
SKETCHES = (
    "Sketches: kl_estimate is an estimate{noise}. kl_lower, kl_upper and tv_upper hold {confidence} at all positions "
    "of a sequence together; tv_lower is certain. That confidence is over the draw of the random signs, {signs}."
)
LARGEST = (
    "The largest kl_upper and tv_upper are upper limits of the largest KL and TV among these sequences {confidence}: "
    "which sequence has the largest does not depend on the signs. A mean of upper bounds is the mean of limits that "
    "hold so for one sequence each, not a limit of the mean; nor do limits of kept sequences hold so where sketches "
    "chose what was kept."
)
SHARED = (
    "kl_lower, kl_upper, tv_lower and tv_upper are rigorous in the {interval} interval sequences and hold {confidence} "
    "in the {sketch} sketched ones: error bounds and widths are kept apart, other figures of these names cover both."
)
MIXED = "Rows differ in grade: exact and estimated figures stand apart and cover different rows."
_DECIDES = (("exact", "seq_max_kl", " where exact"), ("sketch", "seq_max_kl_estimate", " where sketched"))
"""Grades whose rows delta_max is compared with a divergence of the whole vocabulary in."""


def at_confidence(confidence: float | None) -> str:
    """`at 95 % confidence`; the scores may not say which."""
    return "at the confidence they were scored with" if confidence is None else f"at {percent(confidence)} confidence"


def verdict(
    counts: Counts, sequences: dict[str, Quantiles], n_kept: int | None, criteria: list[str], confidence: float | None
) -> str:
    """The outcome in one sentence, for somebody who reads no further; `confidence` is that of sketches' bounds."""
    if not counts.n_total:
        return "No rollouts were read."
    far = _farthest(sequences)
    if "seq_max_tv_upper" in sequences and set(counts.grades) == {"sketch"}:
        far += f" Largest TV at most {sequences['seq_max_tv_upper'].max:.4g} {at_confidence(confidence)}."
    sequences_of_all = f"{counts.n_total:,} sequence{'s' * (counts.n_total != 1)}"
    if n_kept is None:
        return f"{sequences_of_all} read, nothing decided (no thresholds given). {far}".rstrip()
    share = f"{n_kept:,} of {sequences_of_all} kept ({percent(n_kept / counts.n_total)})"
    return f"{share}{': ' + '; '.join(criteria) if criteria else ''}. {far}".rstrip()


def _farthest(sequences: dict[str, Quantiles]) -> str:
    for name, words in (
        ("kl", "Largest exact KL"),
        ("kl_estimate", "Largest KL, estimated from sketches,"),
        ("kl_lower", "Largest KL is at least"),
        ("k2", "Largest k2 of a sampled token"),
    ):
        spread = sequences.get(f"seq_max_{name}")
        if spread is not None:
            return f"{words} {spread.max:.4g} nats."
    return ""


def notes(
    counts: Counts,
    bounds: dict[str, dict[str, BoundsBlock]],
    widths: dict[str, BoundWidths],
    compared: bool,
    sampled: bool,
) -> list[str]:
    """What the numbers do and do not claim; only what applies.

    Args:
        counts: what was read.
        bounds: subset -> evidence -> block.
        widths: by grade.
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
    return [sentence for sentence, applies in said if applies] + _on_sketches(counts, widths.get("sketch"))


def _on_sketches(counts: Counts, found: BoundWidths | None) -> list[str]:
    """What sketches estimate and what they bound, with the figures of those that were read."""
    if found is None:
        return []
    confidence, smallest = at_confidence(found.confidence), min(map(int, found.dims), default=0)
    noise = ", right to second order only"
    if smallest > 0:
        share = percent(round((2 / smallest) ** 0.5, 2))
        noise = f", off at a token by about {share} of what is outside the list (m = {smallest}){noise}"
    signs = "one draw for all rows, so that misses come together"
    if len(found.seeds) > 1:
        signs = f"one for each of {len(found.seeds)} seeds, so that misses of a seed come together"
    said = [
        SKETCHES.format(noise=noise, confidence=confidence, signs=signs),
        LARGEST.format(confidence=confidence),
    ]
    if {"interval", "sketch"} <= counts.grades.keys():
        said.append(SHARED.format(confidence=confidence, **counts.grades))
    return said


def run_notes(differing: Sequence[str]) -> list[str]:
    """That the shards were not all scored alike; `differing` are the settings in which they are not."""
    named = f"The shards were scored by runs that differ in {', '.join(differing)}; the first is shown."
    return [named] if differing else []


def deciding(thresholds: Thresholds, grades: Collection[str]) -> str:
    """Name of the statistic that delta_max is compared with in rows of these grades."""
    named = thresholds.max_of
    if named and (named != "kl" or "sketch" not in grades):
        return f"seq_max_{named}"
    parts = [
        f"{column}{where * (len(grades) != 1)}" for grade, column, where in _DECIDES if grade in (grades or ("exact",))
    ]
    sampled = "the larger of seq_max_k2 and seq_max_kl_lower" if "interval" in grades else "seq_max_k2"
    others = not named and (not grades or {"interval", "sampled"}.intersection(grades))
    return ", ".join([*parts, f"{sampled} elsewhere" if parts else sampled] if others else parts)


def interval_method(num_groups: int, num_singles: int) -> str:
    """How an interval of a mean counts its independent units."""
    if not num_groups:
        return f"95 %, {num_singles} sequences taken as independent"
    alone = f" and {num_singles} sequences without one" if num_singles else ""
    return f"95 %, cluster-robust by group_id ({num_groups} groups{alone})"


def evidence_label(evidence: str, subset: str, confidence: float | None) -> str:
    """What a block of bounds rests on."""
    label = EVIDENCE[evidence].label.format(confidence=at_confidence(confidence))
    if subset == "all":
        return label
    chosen = ", of which those limits do not hold so where sketches chose them" if evidence == "sketch" else ""
    return f"{label}; conditional on the kept sequences{chosen}"
