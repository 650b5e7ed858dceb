"""The parts of the summary that the page shows as figures and tables: data only, each type explains itself.

What computes a part stands in the module of its name (`findings`, `distributions`, `metrics`, `deltas`, `lengths`,
`horizons`, `bins`, `impulses`, `worst`); what shows it reads nothing but these.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What a reader must know before the numbers, in plain words.

    Attributes:
        code: stable name for machines, as `placeholder_logprobs`.
        sentence: what was found, what it means, what to do.
        n, of: how many `unit` of how many were found so; None where nothing is counted.
        unit: `sequences`, `tokens` or `groups`.

    Worked instance: Finding("several_policy_versions", "12 of 400 sequences ...", 12, 400, "sequences").
    """

    code: str
    sentence: str
    n: int | None = None
    of: int | None = None
    unit: str | None = None


@dataclass(frozen=True)
class Distribution:
    """Counts over bins of nearly equal width on a logarithmic axis, two in each octave.

    Attributes:
        edges: [b + 1] ascending, above 0; a bin holds edges[i] <= value < edges[i + 1].
        counts: [b] tokens or sequences.
        num_zero: values of exactly 0.
        num_inf: values of +inf.
    """

    edges: list[float]
    counts: list[int]
    num_zero: int
    num_inf: int


@dataclass(frozen=True)
class ProbabilityDensity:
    """Sampled tokens by their probability under both policies.

    Attributes:
        edges: [b + 1] probabilities, from 0 to 1; a bin holds edges[i] < p <= edges[i + 1].
        counts: [b][b] tokens: counts[i][j] with the rollout probability in bin i and the trainer's in bin j.
    """

    edges: list[float]
    counts: list[list[int]]


@dataclass(frozen=True)
class Metric:
    """One figure that training logs show too.

    Attributes:
        value: of these data.
        low, high: 95 % percentile bootstrap interval over groups (rollouts without one count as their own); NaN
            where fewer than two clusters, or an infinite value, leave none, and for maxima.
        n: tokens or sequences behind it.
        clusters: independent units that were drawn again.
        definition: the formula in words.
        elsewhere: project -> the name it logs the same quantity by.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int
    definition: str
    elsewhere: dict[str, str]


@dataclass(frozen=True)
class DeltaRow:
    """What one threshold would do; a row of a table delta -> kept.

    Attributes:
        num_kept, share_kept: sequences with statistic <= delta, and their share of all with the statistic.
        share_tokens_kept: their policy tokens over all policy tokens.
        num_kept_correct, num_rejected_correct: of the sequences with a reward above 0; None without rewards.
        mean_reward_kept: None without rewards or where nothing is kept.
    """

    delta: float
    num_kept: int
    share_kept: float
    share_tokens_kept: float
    num_kept_correct: int | None
    num_rejected_correct: int | None
    mean_reward_kept: float | None


@dataclass(frozen=True)
class DeltaTable:
    """Thresholds on one statistic, ascending.

    Attributes:
        n: sequences with the statistic, and those without policy tokens, which are never kept.
        marked: the thresholds that the paper puts on this statistic; empty where it has none.
    """

    n: int
    num_tokens: int
    marked: list[float]
    rows: list[DeltaRow]


@dataclass(frozen=True)
class Target:
    """The smallest threshold of a fine grid (0.5 %) that keeps at least the wanted share; `delta` None: none does."""

    statistic: str
    target: float
    delta: float | None
    share_kept: float | None


@dataclass(frozen=True)
class LengthCurve:
    """Share of the sequences of each length that one threshold keeps; None where a bin is empty."""

    statistic: str
    delta: float
    share_kept: list[float | None]


@dataclass(frozen=True)
class AcceptanceByLength:
    """Acceptance by number of policy tokens: the threshold of each curve keeps about the same share of all sequences.

    Attributes:
        edges: [b + 1] lengths; a bin holds edges[i] <= num_tokens < edges[i + 1].
        n: [b] sequences.
        curves: max, mean and total criterion.
    """

    edges: list[int]
    n: list[int]
    curves: list[LengthCurve]


@dataclass(frozen=True)
class BoundCurves:
    """The bounds as functions of the horizon, with delta and eps as measured and D_seq cut at it.

    Attributes:
        horizons: [h] ascending, the last one that of the bounds block.
        published, sharp: name of the bound -> [h].
    """

    horizons: list[int]
    published: dict[str, list[float]]
    sharp: dict[str, list[float]]


@dataclass(frozen=True)
class BinDivergence:
    """One divergence over the tokens of a bin: mean, largest, and the bin's share of the sum over all tokens."""

    mean: float
    max: float
    share: float


@dataclass(frozen=True)
class TokenBin:
    """Tokens (of sequences, for lengths) whose quantity lies in low <= x < high; None is unbounded."""

    low: float | None
    high: float | None
    n: int
    divergences: dict[str, BinDivergence]


@dataclass(frozen=True)
class TokenRow:
    """One token id; `text` where a tokenizer was at hand."""

    id: int
    text: str | None
    n: int
    divergences: dict[str, BinDivergence]


@dataclass(frozen=True)
class ImpulseShare:
    """Impulses among some of the tokens.

    Attributes:
        value: the category (a staleness), or None for all tokens.
        num_tokens: tokens with the divergence.
        num_impulses: of these.
        share_of_sum: part of the summed divergence that the impulses carry.
        median: of all tokens: what drift moves and impulses do not.
        mean_elsewhere: mean divergence of the tokens that are no impulses.
    """

    value: int | None
    num_tokens: int
    num_impulses: int
    share_of_sum: float
    median: float
    mean_elsewhere: float


@dataclass(frozen=True)
class Impulses:
    """Isolated tokens far above their neighbours against a shift of all tokens.

    Attributes:
        divergence: what was compared.
        definition: when a token counts, in words.
        all: over all tokens.
        by_staleness: empty without it.
        sentence: which of the two it is, in words.
    """

    divergence: str
    definition: str
    all: ImpulseShare
    by_staleness: list[ImpulseShare]
    sentence: str


@dataclass(frozen=True)
class Routing:
    """Tokens whose stored `routed_experts` equal the trainer's in every layer, against those where some differ.

    Attributes:
        num_tokens: with both.
        mean_agreement: mean share of the stored experts that the trainer chose too.
        num_differing: tokens with a share below 1.
        same, differing: the divergences of the two kinds of tokens.
    """

    num_tokens: int
    mean_agreement: float
    num_differing: int
    same: dict[str, BinDivergence]
    differing: dict[str, BinDivergence]


@dataclass(frozen=True)
class ShownToken:
    """One token of an excerpt; `text` None without a tokenizer, `value` None where there is none (masked, prompt)."""

    id: int
    text: str | None
    value: float | None
    rollout_logprob: float | None
    trainer_logprob: float | None


@dataclass(frozen=True)
class WorstSequence:
    """A sequence with one of the largest values of `statistic`, as it can be found in the shard.

    Attributes:
        divergence: per-token quantity shown, the D of `statistic`.
        position: of the largest value in `response_ids`; None where nothing tells.
        num_tokens: policy tokens; `response_length` counts the others too.
        keep: None where nothing was decided.
        prompt_length, prompt: tokens of the prompt and its last ones.
        start: index in `response_ids` of the first token of `response`.
        response: an excerpt around `position`.
    """

    rollout_id: str
    group_id: str | None
    engine: str | None
    staleness: int | None
    reward: float | None
    keep: bool | None
    statistic: str
    divergence: str
    value: float
    position: int | None
    num_tokens: int
    response_length: int
    prompt_length: int
    prompt: list[ShownToken]
    start: int
    response: list[ShownToken]
