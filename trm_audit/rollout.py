"""The values that flow from shard to shard.

    rollout shard -> RolloutBatch -> (engine) -> TokenScores -> score shard -> verdicts -> training shard

Ragged columns stay flat arrays with offsets, as Arrow lists already are; padding exists only inside the model's
forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from trm_audit.numerics.ragged import Bools, Floats, Ints, Ragged

if TYPE_CHECKING:
    import pyarrow as pa

Grade = Literal["exact", "sketch", "interval", "sampled"]
GRADES: tuple[Grade, ...] = ("exact", "sketch", "interval", "sampled")
"""Best evidence first. A row that carries several is audited with the best."""

BOUNDED_GRADES: tuple[Grade, ...] = ("sketch", "interval")
"""Those that give lower and upper bounds of KL and TV instead of the values."""

AuditedPolicy = Literal["sampling", "tempered", "raw"]
"""Which policy the figures of a row speak of; see schemas/score.md."""

EXACT_DIVERGENCES = ("kl", "kl_reverse", "tv")
SKETCH_ESTIMATES = ("kl_estimate",)
INTERVAL_DIVERGENCES = ("kl_lower", "kl_upper", "tv_lower", "tv_upper")
"""Bounds: rigorous at grade `interval`, at a stated confidence at grade `sketch`."""
SAMPLED_DIVERGENCES = ("log_ratio", "ratio", "k1", "k2", "k3", "abs_log_ratio")
DIVERGENCES = SAMPLED_DIVERGENCES + EXACT_DIVERGENCES + SKETCH_ESTIMATES + INTERVAL_DIVERGENCES
"""Every D of the `seq_max_D`, `seq_mean_D`, `seq_sum_D`, `seq_argmax_D` columns."""

TOKEN_SCORES = (
    "trainer_logprobs",
    "log_ratio",
    *EXACT_DIVERGENCES,
    "rollout_entropy",
    "trainer_entropy",
    *SKETCH_ESTIMATES,
    "hellinger2",
    *INTERVAL_DIVERGENCES,
    "routing_agreement",
)
"""Per-token columns of a score shard, in this order."""


@dataclass(frozen=True)
class Sampling:
    """How one rollout was sampled, and at which stage its stored values were taken.

    Attributes:
        temperature: above 0.
        top_p: in (0, 1]; 1 is off.
        top_k: at least 1, or -1 for off.
        logprobs_mode: `raw`, `tempered` or `processed`.

    Worked instance: Sampling(0.6, 0.9, -1, "processed"): values after division by 0.6 and nucleus truncation.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    logprobs_mode: str = "raw"

    @property
    def truncates(self) -> bool:
        return self.top_p < 1.0 or self.top_k > 0


@dataclass(frozen=True)
class TopK:
    """Top-K evidence of one batch, flat over its response tokens.

    Attributes:
        ids: [n] int64 token ids, per position descending by log-probability.
        logprobs: [n] float64 their log-probabilities (nats).
        offsets: [tokens + 1] where each response position starts; K is the difference and may be 0 (row without this
            evidence).
        step: largest relative error of a stored value (half a unit in the last place): 2**-11 float16, 2**-24 float32.

    Worked instance: two positions with K = 2 and 1: ids [7, 3, 9], logprobs [-.1, -2.4, -.01], offsets [0, 2, 3].
    """

    ids: Ints
    logprobs: Floats
    offsets: Ints
    step: float


@dataclass(frozen=True)
class Sketches:
    """Random projections of what the top-K lists leave out, of one batch (see `numerics.sketch`).

    Attributes:
        vectors: per row [tokens, m] flattened, float16; empty for a row without.
        dim: [rows] m, 0 for a row without.
        seed: [rows] of the signs.
        tail_mass: [response tokens] float64, the probability of all tokens outside the list; NaN where there is none.

    Worked instance: one row of two tokens, m = 64: vectors.values [128], dim [64], seed [1], tail_mass [.05, .002].
    """

    vectors: Ragged
    dim: Ints
    seed: Ints
    tail_mass: Floats


@dataclass(frozen=True)
class RoutedExperts:
    """The experts that the engine sent each token to.

    Attributes:
        ids: per row [positions, layers, k] flattened: int16 numbers of the experts at each position, from the first
            token of the prompt on; -1 where unknown. Empty for a row without.
        layers, k: [rows] the shape of a position; 0 for a row without.

    Worked instance: one row of two positions, two layers, k = 2: ids [[0, 3, 1, 2, 0, 3, 2, 1]], layers [2], k [2].
    """

    ids: Ragged
    layers: Ints
    k: Ints


@dataclass(frozen=True)
class RolloutBatch:
    """Some rows of one rollout shard, checked against the schema.

    Attributes:
        shard: name of the file (or `-`), for messages.
        row_numbers: [rows] index of each row in the file.
        columns: all columns in canonical types, those that only pass through included.
        rollout_id: [rows].
        group_id: [rows], or None without the column.
        prompt: token ids, int64.
        response: token ids, int64.
        response_mask: [response tokens] True where the policy sampled the token.
        rollout_logprobs: [response tokens] float64, NaN where absent.
        stored_trainer_logprobs: [response tokens] float64, NaN where absent, or None without the column.
        topk: top-K evidence, or None without the columns.
        sketches: of the tails of these lists, or None without the columns.
        stored_entropy: [response tokens] float64 entropy of pi_roll as the sampler computed it, NaN where absent, or
            None without the column.
        sampling: [rows].
        policy_version: [rows] oldest version of the row, float64 with NaN for null, or None without the column.
        grade: [rows] best grade the row's evidence allows; None where there is no policy token to speak of.
        routed_experts: routing of the engine, or None without the column.

    Worked instance: one row, prompt [5, 11], response [3, 8], mask [True, False], rollout_logprobs [-.1, nan], grade
        ["sampled"].
    """

    shard: str
    row_numbers: Ints
    columns: pa.RecordBatch
    rollout_id: Sequence[str]
    group_id: Sequence[str | None] | None
    prompt: Ragged
    response: Ragged
    response_mask: Bools
    rollout_logprobs: Floats
    stored_trainer_logprobs: Floats | None
    topk: TopK | None
    sampling: Sequence[Sampling]
    policy_version: Floats | None
    grade: Sequence[Grade | None]
    routed_experts: RoutedExperts | None = None
    sketches: Sketches | None = None
    stored_entropy: Floats | None = None

    def __len__(self) -> int:
        return len(self.rollout_id)

    def place(self, row: int) -> str:
        """Where a row stands, for messages."""
        return f"{self.shard}, row {self.row_numbers[row]} (rollout_id={self.rollout_id[row]})"


@dataclass
class TokenScores:
    """Scores of one batch, flat over its response tokens, NaN where a token or its row's grade has none.

    Attributes:
        tokens: name from `TOKEN_SCORES` -> [response tokens] float64.
        rollout_logprobs: [response tokens] what `log_ratio` was computed with.
        rebuilt: [rows] True where `rollout_logprobs` is not the stored column.
        audited_policy: [rows].
        num_disagreements: [rows] tokens whose stored log-probability does not fit the stored distribution.

    Worked instance: two tokens of a `sampled` row: trainer_logprobs [-.2, -.7], log_ratio [-.1, .1], kl [nan, nan].
    """

    tokens: dict[str, Floats]
    rollout_logprobs: Floats
    rebuilt: Bools
    audited_policy: list[AuditedPolicy]
    num_disagreements: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class NoiseSpread:
    """Spread over tokens of how far two scorings of the same weights are apart (nats): mean, 99 % quantile, maximum."""

    mean: float
    p99: float
    max: float


@dataclass(frozen=True)
class Noise:
    """How far one scoring is from another of the same weights: at the sampled token, and over the vocabulary.

    Worked instance: Noise(NoiseSpread(.004, .06, .07), NoiseSpread(2e-5, 4e-4, 5e-4)), bfloat16 against float32.
    """

    abs_delta_logprob: NoiseSpread
    kl: NoiseSpread
