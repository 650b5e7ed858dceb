"""The warnings of the report, in plain words: what was found, what it means, what to do; and what the evidence permits.

    found = findings(quality, counts=counts, metrics=metrics, acceptance=0.54, noise_floor=None, violations=None,
                     tokenizer=None)
    found[0].code, found[0].sentence

Only what applies is said, the most serious first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from trm_audit.report.blocks import Finding, Metric
from trm_audit.report.noise import NoiseFloor
from trm_audit.report.quality import LONG_RUN, QualityTotals
from trm_audit.report.shown import percent
from trm_audit.report.summary import Counts, Violations
from trm_audit.report.words import at_confidence

if TYPE_CHECKING:
    from trm_audit.report.decode import TokenText

MOST_ROWS = 0.5
"""Share of the sequences that must fit better shifted: no real rollout did, of shifted ones nine in ten and more."""
RATIO_OFF = 0.01
"""How far from 1 a mean ratio must be to be worth a word, however narrow its interval."""
CORRELATION, DEVIATIONS = 0.2, 4.0
"""Correlation of rejection and length that is worth a word, and the standard errors that it must lie away from 0."""
LOW_ACCEPTANCE = 0.7
FEWEST_SEQUENCES = 10
"""Of fewer an acceptance says little."""
"""Share of kept sequences below which the cause is mostly not the threshold."""
FEWEST_RESPONSES = 16
"""Responses that must all survive a round trip through the tokenizer before that says something."""

SENTENCES = {
    "placeholder_logprobs": "Placeholders among the rollout log-probabilities of {n} of {of} sequences ({tokens} "
    "tokens): exact zeros, which say probability 1 where the trainer is not sure, or values such as -9999. What rests "
    "on the sampled tokens of these sequences is wrong. Leave a list null where the engine gave no value, set "
    "response_mask false on tokens that it did not sample, and score again.",
    "zero_tails": "Padding that was not cut, it seems: {n} of {of} sequences end in {run} or more rollout "
    "log-probabilities of exactly 0.0 that the trainer contradicts. Cut the per-token lists to the length of the "
    "response and score again.",
    "shifted_logprobs": "Log-probabilities off by one: in {n} of {of} sequences those of the rollout fit the trainer's "
    "better when they are read one token {side}. What rests on sampled tokens compares different ones and is wrong. "
    "Entry t of both lists must belong to response_ids[t]: correct the list that does not and score again.",
    "disagreements": "Stored log-probabilities that do not fit the distribution stored beside them: {tokens} tokens in "
    "{n} of {of} sequences. One of the two is of another token, temperature or stage, and what rests on it is wrong. "
    "Check temperature, top_p, top_k and logprobs_mode, and that row t belongs to response_ids[t].",
    "infinite_divergence": "Infinite KL at {n} of {of} tokens: the trainer gives probability 0 to something that the "
    "sampler could say. Their sequences are never kept, and of the bounds over all rows only those from TV can say "
    "something. Look for a vocabulary that was cut or for logits that the model sets to -inf.",
    "mean_ratio": "The mean ratio is {value:.4g} (95 % interval {low:.4g} to {high:.4g}), where it should be 1. {why}",
    "raw_policy": "Raw log-probabilities of a sampler with a temperature or truncation in {n} of {of} sequences: both "
    "policies are compared at temperature 1, and nothing can be said of the one that sampled. Have the engine store "
    "processed log-probabilities, or full logits.",
    "tempered_policy": "Log-probabilities from before the truncation (top-p, top-k) in {n} of {of} sequences: policies "
    "are compared without it, and nothing can be said of the one that sampled. Have the engine store processed "
    "log-probabilities, or full logits.",
    "truncated_sampler": "{n} of {of} sequences were sampled with top-p or top-k, and the trainer is not truncated: "
    "their KL and TV count what was cut off, which equal weights would show as well (KL of minus the log of the "
    "trainer's probability on what was left{about}).{sketch} Sample without truncation to audit the engine alone.",
    "several_policy_versions": "Weights changed while a response was sampled, in {n} of {of} sequences: figures by "
    "staleness and version count each of them as its oldest. Divergences hold token by token. For one policy in each "
    "sequence let responses end before the engine takes new weights.",
    "retokenized": "Token ids that were probably made from text: all {n} responses that were looked at are exactly "
    "what the tokenizer makes of their text, and none ends with a special token. What was really sampled is then lost, "
    "the end of the response too, and log-probabilities may belong to other tokens. Store the ids that the engine "
    "sampled.",
    "length_correlated_rejection": "Rejection goes by length: rejected sequences are {times:.2g} times as long as kept "
    "ones ({rejected:.4g} against {kept:.4g} tokens, correlation {r:.2f}), so that {side} responses are trained on "
    "less. A total grows with length by definition, and a maximum has more tokens to find one in; a mean does neither. "
    "See acceptance by length, and compare with a criterion on the mean.",
    "low_acceptance": "Only {share} of {of} sequences {what}. The gradient is divided by the number of all of "
    "them, so the step shrinks by as much. Below {limit:g} % something before the filter is mostly to blame (settings, "
    "stale weights, precision): look at the other warnings and the worst sequences before raising the threshold.",
    "below_noise_floor": "{sentence}",
    "unmeasured_noise_floor": "Scored in {dtypes}, and the noise floor of that was not measured{which}: small "
    "divergences may be rounding. Score again without --noise-floor 0, or with --dtype float32.",
    "skipped_rows": "{n} of {of} sequences could not be read and were left out of the scores: they do not count in N, "
    "and nothing is said of them. skipped.jsonl beside the scores says why; mend them and score again.",
    "dropped_rows": "{n} of {of} sequences were rejected and dropped before this report: they count in N, but "
    "distances, curves and bounds speak of the others. For all of them report on the score shards.",
    "no_policy_tokens": "{n} of {of} sequences have no token that the policy sampled: they are never kept and count in "
    "N. Check response_mask, and responses that are empty.",
}
CODES = tuple(SENTENCES)
"""In order of seriousness: from data whose every figure is wrong to what only has to be known."""

_RAW_TRUNCATED = (
    "Tokens were drawn from a truncated policy (top-p, top-k) and are compared by log-probabilities from before the "
    "truncation, so that k3 does not estimate a KL. Store processed ones, or sample untruncated."
)
_PROCESSED_TRUNCATED = (
    "A truncated sampler (top-p, top-k) does this: the mean is the share of the trainer's probability on what was "
    "left, and k3 understates KL by about {missing:.2g} a token. Read KL or its estimate where there is one."
)
_NOT_TRUNCATED = (
    "No truncation that is recorded explains it. Check temperature, top_p, top_k and logprobs_mode; if they are "
    "right, the policies are too far apart for a mean of ratios, and for k3, to tell much."
)
_CLAIMS = {
    "exact": "exact KL and TV at every context that was sampled, so that each verdict can be checked",
    "sketch": "an estimate of KL over the whole vocabulary at every context that was sampled, with bounds of KL and an "
    "upper bound of TV that hold {confidence} at all positions of a sequence together (over the draw of the random "
    "signs), and a certain lower bound of TV",
    "interval": "rigorous lower and upper bounds of KL and TV at every context that was sampled, so that a verdict is "
    "certain where the threshold lies outside them",
    "sampled": "an estimate from the sampled tokens alone (k1, k2, k3), so that no verdict is certain",
}
_SEEN = (
    "Contexts that were not sampled were not seen: the largest divergence here may be below the largest there is, and "
    "error bounds are plug-in estimates."
)


def findings(
    quality: QualityTotals,
    *,
    counts: Counts,
    metrics: Mapping[str, Metric],
    acceptance: float | None,
    noise_floor: NoiseFloor | None,
    violations: Violations | None,
    tokenizer: TokenText | None,
) -> list[Finding]:
    """The warnings that apply, the most serious first (`CODES`).

    Args:
        quality: totals over all batches.
        counts: what was read.
        metrics: by our name; `mean_ratio` is looked at.
        acceptance: share of sequences kept, None where nothing was decided.
        noise_floor: of the runs below float32.
        violations: sequences above delta_max, for the acceptance where nothing was decided.
        tokenizer: to tokenize responses again; None leaves that out.
    """
    found = [
        *_in_lists(quality),
        *_in_counts(counts),
        *_mean_ratio(quality, counts, metrics.get("mean_ratio")),
        *_truncated(quality, counts, metrics.get("mean_ratio")),
        *_retokenized(quality, tokenizer),
        *_length_correlated(quality),
        *_low_acceptance(counts, acceptance, violations),
        *_noise(noise_floor),
    ]
    return sorted(found, key=lambda each: CODES.index(each.code))


def evidence(counts: Counts, confidence: float | None = None) -> str:
    """The grades that an audit rests on and what they permit to claim, in two sentences.

    Args:
        counts: what was read.
        confidence: of bounds from sketches, None where nothing tells it.
    """
    claims = {grade: said.format(confidence=at_confidence(confidence)) for grade, said in _CLAIMS.items()}
    grades = {grade: n for grade, n in counts.grades.items() if n}
    of = sum(grades.values())
    if not of:
        return "No sequence with a grade of evidence was read: nothing can be claimed."
    if len(grades) == 1:
        (grade,) = grades
        claim = f"Grade {grade}: {claims[grade]}"
    else:
        claim = "Mixed grades: " + "; ".join(
            f"{n} of {of} sequences {grade} ({claims[grade]})" for grade, n in grades.items()
        )
    others = sum(n for policy, n in counts.audited_policies.items() if policy != "sampling")
    if others:
        claim += f"; for {others} sequences this speaks of another policy than the one that sampled (see the warnings)"
    return f"{claim}. {_SEEN}"


def _say(code: str, n: int, of: int, unit: str = "sequences", **more: object) -> Iterator[Finding]:
    """The finding on `n` of `of`, nothing where there are none."""
    if n:
        yield Finding(code, SENTENCES[code].format(n=n, of=of, **more), n, of, unit)


def _in_lists(quality: QualityTotals) -> Iterator[Finding]:
    """What stands in the per-token lists."""
    found = quality.counts
    known, tokens = found["num_logprobs"], found["placeholder_tokens"]
    yield from _say("placeholder_logprobs", found["num_placeholders"], known, tokens=tokens)
    yield from _say("zero_tails", found["num_zero_tails"], known, run=LONG_RUN)
    better, side = max((found["num_later"], "later"), (found["num_earlier"], "earlier"))
    if better > MOST_ROWS * found["num_shift_tried"]:
        yield from _say("shifted_logprobs", better, found["num_shift_tried"], side=side)
    tokens = found["disagreeing_tokens"]
    yield from _say("disagreements", found["num_disagreeing"], found["num_checked"], tokens=tokens)
    yield from _say("several_policy_versions", found["num_several_versions"], found["num_rows"])


def _in_counts(counts: Counts) -> Iterator[Finding]:
    """What the counts say as they are."""
    total = counts.n_total
    yield from _say("infinite_divergence", counts.num_infinite, counts.num_tokens, "tokens")
    audited = counts.audited_policies
    yield from _say("raw_policy", audited.get("raw", 0), sum(audited.values()))
    yield from _say("tempered_policy", audited.get("tempered", 0), sum(audited.values()))
    yield from _say("skipped_rows", counts.num_skipped, total + counts.num_skipped)
    yield from _say("dropped_rows", counts.num_dropped, total)
    yield from _say("no_policy_tokens", counts.num_without_policy_tokens, total)


def _mean_ratio(quality: QualityTotals, counts: Counts, ratio: Metric | None) -> Iterator[Finding]:
    """E[ratio] under the rollout policy is 1 unless that policy excludes tokens that the trainer does not."""
    if ratio is None or not (ratio.low > 1 or ratio.high < 1) or not abs(ratio.value - 1) > RATIO_OFF:
        return
    others = any(n for policy, n in counts.audited_policies.items() if policy != "sampling")
    truncated = quality.counts["num_truncated"]
    if truncated and others:
        why = _RAW_TRUNCATED
    elif truncated and ratio.value < 1:
        why = _PROCESSED_TRUNCATED.format(missing=1 - ratio.value)
    else:
        why = _NOT_TRUNCATED
    said = SENTENCES["mean_ratio"].format(value=ratio.value, low=ratio.low, high=ratio.high, why=why)
    yield Finding("mean_ratio", said)


def _truncated(quality: QualityTotals, counts: Counts, ratio: Metric | None) -> Iterator[Finding]:
    """Distributions of a truncated sampler: E[ratio] is then the trainer's probability on what was left."""
    n, of = quality.counts["num_cut"], quality.counts["num_rows"]
    known = ratio is not None and n == of and 0 < ratio.value < 1
    about = f", {-math.log(ratio.value):.2g} a token by the mean ratio" if known and ratio is not None else ""
    sketch = " Estimates from sketches count the part outside the list up to twice." * bool(counts.grades.get("sketch"))
    yield from _say("truncated_sampler", n, of, about=about, sketch=sketch)


def _retokenized(quality: QualityTotals, tokenizer: TokenText | None) -> Iterator[Finding]:
    n = len(quality.sample.responses)
    if tokenizer is not None and n >= FEWEST_RESPONSES and quality.sample.are_text(tokenizer):
        yield from _say("retokenized", n, n)


def _length_correlated(quality: QualityTotals) -> Iterator[Finding]:
    """Far enough from none, and more than chance gives."""
    r, kept, rejected = quality.length_correlation(), quality.kept, quality.rejected
    of = kept.count + rejected.count
    if abs(r) > CORRELATION and abs(r) * math.sqrt(of - 1) > DEVIATIONS:
        yield from _say(
            "length_correlated_rejection",
            rejected.count,
            of,
            times=rejected.mean / kept.mean,
            rejected=rejected.mean,
            kept=kept.mean,
            r=r,
            side="long" if r > 0 else "short",
        )


def _low_acceptance(counts: Counts, acceptance: float | None, violations: Violations | None) -> Iterator[Finding]:
    """Of the verdicts, or of delta_max alone where there are none."""
    if acceptance is not None:
        rejected, of = counts.n_total - round(acceptance * counts.n_total), counts.n_total
        what = "are kept"
    elif violations is not None:
        rejected, of = violations.sequences.violations, violations.sequences.n
        what = f"stay within delta_max {violations.delta_max:g} ({violations.divergence})"
    else:
        return
    if of >= FEWEST_SEQUENCES and (of - rejected) / of < LOW_ACCEPTANCE:
        share = percent((of - rejected) / of)
        yield from _say("low_acceptance", rejected, of, share=share, what=what, limit=100 * LOW_ACCEPTANCE)


def _noise(floor: NoiseFloor | None) -> Iterator[Finding]:
    """Thresholds below the floor, and a floor that nobody measured."""
    if floor is None:
        return
    for below in floor.below:
        yield Finding("below_noise_floor", SENTENCES["below_noise_floor"].format(sentence=below.sentence))
    missing = floor.num_runs - floor.num_measured
    if missing:
        which = f" in {missing} of {floor.num_runs} runs" if floor.num_measured else ""
        said = SENTENCES["unmeasured_noise_floor"].format(dtypes=" and ".join(floor.dtypes), which=which)
        yield Finding("unmeasured_noise_floor", said)
