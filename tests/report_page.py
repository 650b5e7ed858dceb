"""A summary with every block filled, as the page's tests show it: plausible figures, hostile names and texts."""

from __future__ import annotations

import math
from itertools import pairwise

from report_rows import run_with_floor, worth_of

from trm_audit.numerics.bounds import Bound
from trm_audit.numerics.confidence import MeanInterval
from trm_audit.report.blocks import (
    AcceptanceByLength,
    BinDivergence,
    BoundCurves,
    DeltaRow,
    DeltaTable,
    Distribution,
    Finding,
    Impulses,
    ImpulseShare,
    LengthCurve,
    Metric,
    ProbabilityDensity,
    Routing,
    ShownToken,
    Target,
    TokenBin,
    TokenRow,
    WorstSequence,
)
from trm_audit.report.noise import noise_floor
from trm_audit.report.summary import (
    AcceptanceCurves,
    AuditSummary,
    BoundsBlock,
    BoundWidths,
    Category,
    CategoryDivergence,
    CombinedAcceptance,
    Counts,
    Curve,
    PpoTerms,
    Quantiles,
    Rewards,
    SequenceTotal,
    Share,
    Thresholds,
    TokenMasking,
    Violations,
)
from trm_audit.report.worth import evidence_worth

HOSTILE = (
    "<script>alert(1)</script>",
    '" onmouseover="alert(2)" x="',
    "' onfocus='alert(3)",
    "\x1b[31mred\x1b[0m\x07",
    "\u202etxt.exe\u2066\u200b",
    "$\\frac{1}{2}$ $x^{2",
    "{{7*7}}{% raw %}{# #}",
    "<img src=x onerror=alert(4)>",
    "</title></style></svg><a href='https://example.org/'>x</a>",
    "javascript:alert(5)",
    "W" * 10_000,
    "\ud800 lone",
    "a\r\n\tb\x00c",
    "&lt;b&gt;&#x3c;",
)
"""Texts that must appear as text, wherever the data bring them."""

DELTAS = [float(f"{m}e{e}") for e in range(-6, 4) for m in (1, 2, 5)]
PAIR_DELTAS = [float(f"{m}e{e}") for e in range(-6, 1) for m in (1, 2, 5)] + [10.0]
BOUND_NAMES = (
    *("classical_bound", "coupling_bound", "pinsker_marginal_bound", "pinsker_marginal_tv_bound"),
    *("mixed_bound", "mixed_tv_bound", "adaptive_bound"),
)


def logistic(x: float, middle: float, width: float = 1.0) -> float:
    """A plausible share kept at threshold x."""
    return 1 / (1 + math.exp(-(math.log10(x) - math.log10(middle)) / width * 2.5))


def quantiles(scale: float, n: int) -> Quantiles:
    factors = {"min": 1e-4, "p50": 0.01, "p90": 0.3, "p99": 2.0, "p999": 9.0, "max": 31.4159, "mean": 0.123456}
    return Quantiles(n=n, **{name: scale * factor for name, factor in factors.items()})


def distribution(scale: float, n: int, zeros: int = 0, infinite: int = 0) -> Distribution:
    edges = [scale * 2.0**k * (1.0 if half == 0 else 181 / 128) for k in range(-14, 6) for half in (0, 1)]
    counts = [int(n / 9 * math.exp(-(((i - 22) / 7) ** 2))) for i in range(len(edges) - 1)]
    return Distribution(edges, counts, zeros, infinite)


def divergences(scale: float, share: float = 0.1) -> dict[str, BinDivergence]:
    return {
        name: BinDivergence(scale * factor, 40 * scale * factor, share)
        for name, factor in (("kl", 1.0), ("tv", 0.5), ("k2", 1.3), ("k3", 1.1), ("abs_log_ratio", 3.0))
    }


def bins(edges: list[float | None], scale: float) -> list[TokenBin]:
    total = sum(range(1, len(edges)))
    return [
        TokenBin(low, high, 1000 + 37 * i, divergences(scale * 2.0**-i, (len(edges) - 1 - i) / total))
        for i, (low, high) in enumerate(pairwise(edges))
    ]


def category(value: str | int, scale: float, acceptance: float | None) -> Category:
    spreads = {name: CategoryDivergence(each.mean, each.max) for name, each in divergences(scale).items()}
    return Category(value, 80, 1040, acceptance, spreads)


def bounds_block(scale: float, label: str, minorizer: Bound | None = None) -> BoundsBlock:
    bounds = {name: Bound(scale * 0.31**i, scale * 0.31**i / 2) for i, name in enumerate(BOUND_NAMES)}
    return BoundsBlock(
        label=label,
        rows=400,
        horizon=4096,
        inputs={"seq_max_kl": 0.00123 * scale, "mean_seq_sum_kl": 0.0456 * scale, "seq_max_tv": None},
        bounds=bounds,
        minimum="adaptive_bound",
        vacuous=False,
        sentence="The smallest bound, adaptive_bound, lies below the reward's range.",
        minorizer=minorizer,
    )


def metric(value: float, width: float, definition: str, **elsewhere: str) -> Metric:
    return Metric(value, value - width, value + width, 5019, 100, definition, elsewhere)


def tokens(count: int, texts: tuple[str, ...], peak: int | None = None) -> list[ShownToken]:
    out = []
    for i in range(count):
        masked = peak is None or i % 7 == 3
        value = None if masked and i != peak else 3.7 * 0.86 ** abs(i - (peak or 0))
        known = None if masked else -0.01 * i
        out.append(ShownToken(100 + i, texts[i % len(texts)], value, known, known))
    return out


def worst(index: int, hostile: str) -> WorstSequence:
    texts = (" The", " answer", " is", "\n", " 42", ",", hostile, " därför", " 因为", "\t", " 🙂", ".")
    return WorstSequence(
        rollout_id=f"{hostile}/s{index}",
        group_id=hostile if index % 2 else None,
        engine=hostile,
        staleness=10 * index,
        reward=0.5,
        keep=bool(index % 2),
        statistic="seq_max_kl",
        divergence="kl",
        value=math.inf if index == 0 else 31.4159 / index,
        position=200 + 60,
        num_tokens=900 + index,
        response_length=1000 + index,
        prompt_length=333,
        prompt=tokens(20, texts),
        start=200,
        response=tokens(120, texts, peak=60),
    )


def acceptance() -> dict[str, object]:
    middles = {"kl": 0.03, "tv": 0.08, "k2": 0.05, "k3": 0.06, "abs_log_ratio": 0.3}
    lowered = {"max": 1.0, "mean": 0.02, "sum": 4.0}
    curves = {
        f"seq_{kind}_{name}": Curve(400, [logistic(d, middle * factor) for d in DELTAS])
        for kind, factor in lowered.items()
        for name, middle in middles.items()
    }
    pairs = [
        CombinedAcceptance(
            a,
            b,
            400,
            PAIR_DELTAS,
            [[min(logistic(x, 0.03), logistic(y, 0.0007)) for y in PAIR_DELTAS] for x in PAIR_DELTAS],
        )
        for a, b in (("kl", "kl"), ("k2", "k3"))
    ]
    return {"acceptance_curves": AcceptanceCurves(DELTAS, curves), "acceptance_combined": pairs}


def delta_tables() -> dict[str, DeltaTable]:
    out = {}
    for name, middle, marked in (
        ("seq_max_kl", 0.03, [0.05]),
        ("seq_mean_kl", 0.0007, [0.001]),
        ("seq_sum_kl", 0.1, []),
    ):
        rows = [
            DeltaRow(d, int(400 * s), s, 0.97 * s, int(150 * s), 150 - int(150 * s), 0.4 + 0.1 * s)
            for d in DELTAS
            if 0.02 < (s := logistic(d, middle)) < 0.98
        ]
        out[name] = DeltaTable(400, 5019, marked, rows)
    return out


def probabilities() -> ProbabilityDensity:
    edges = [
        0,
        1e-6,
        1e-5,
        1e-4,
        1e-3,
        2e-3,
        5e-3,
        0.01,
        0.02,
        0.05,
        0.1,
        0.2,
        0.3,
        0.4,
        0.5,
        0.6,
        0.7,
        0.8,
        0.9,
        0.95,
        0.99,
        1,
    ]
    n = len(edges) - 1
    counts = [[int(40 * (i + 1) ** 1.8 * math.exp(-1.3 * abs(i - j))) for j in range(n)] for i in range(n)]
    return ProbabilityDensity([float(edge) for edge in edges], counts)


def impulses() -> Impulses:
    shares = [
        ImpulseShare(s, 1000 + s, 200 - s, 0.9 - 0.006 * s, 1e-6 * (1 + s), 1e-5 * (1 + s))
        for s in (0, 10, 30, 60, 120)
    ]
    return Impulses(
        divergence="kl",
        definition="kl above 0.01 and ten times the median of its six neighbours.",
        all=ImpulseShare(None, 5019, 488, 0.61, 3.3e-5, 2.2e-4),
        by_staleness=shares,
        sentence="Impulses carry 61 % of the divergence: routing or kernel flips, not drift.",
    )


def horizons() -> BoundCurves:
    points = [2**k for k in range(13)]
    published = {name: [60 * 0.31**i * (t / 4096) ** (2 - i / 4) for t in points] for i, name in enumerate(BOUND_NAMES)}
    return BoundCurves(points, published, {name: [v / 2 for v in values] for name, values in published.items()})


def parts(hostile: tuple[str, ...]) -> dict[str, object]:
    """What colours the page: everything beyond the numbers that every audit has."""
    powers = [float(2**k) for k in range(9)]
    return {
        "distributions": {
            **{name: distribution(0.05, 5019, zeros=3) for name in ("kl", "k3", "abs_log_ratio")},
            **{f"seq_max_{name}": distribution(2.0, 400, infinite=1) for name in ("kl", "k2", "k3", "tv")},
            **{f"seq_mean_{name}": distribution(0.02, 400) for name in ("kl", "k2", "k3", "tv")},
        },
        "probabilities": probabilities(),
        "metrics": {
            "mean_kl": metric(0.0439, 0.011, "mean over tokens of the exact KL(rollout || trainer)"),
            "mean_k3": metric(
                0.0413, 0.012, "mean over tokens of k3", verl="rollout_corr/k3_kl", NeMo_RL="gen_kl_error"
            ),
            "max_abs_log_ratio": Metric(10.44, math.nan, math.nan, 5019, 100, "largest |log_ratio|", {}),
            "chi2_seq": Metric(math.inf, math.nan, math.nan, 400, 100, "mean of exp(2 sum log_ratio), minus 1", {}),
        },
        "delta_tables": delta_tables(),
        "targets": [Target("seq_max_kl", 0.9, 0.1234, 0.9025), Target("seq_mean_kl", 0.9, None, None)],
        "acceptance_by_length": AcceptanceByLength(
            [1, 2, 4, 8, 16],
            [10, 0, 200, 190],
            [
                LengthCurve("seq_max_kl", 0.05, [0.9, None, 0.7, 0.5]),
                LengthCurve("seq_mean_kl", 0.002, [0.62, None, 0.61, 0.63]),
                LengthCurve("seq_sum_kl", 0.2, [0.95, None, 0.6, 0.2]),
            ],
        ),
        "bounds_by_horizon": {"exact": horizons()},
        "by_engine": [category(name, 0.01 * (i + 1), 0.5) for i, name in enumerate(hostile)],
        "by_policy_version": [category(v, 0.1 / (1 + v), 1 - 0.001 * v) for v in (80, 140, 170, 190, 199, 200)],
        "by_staleness": [category(s, 1e-4 * (1 + s), 1 - 0.007 * s) for s in (0, 10, 30, 60, 120)],
        "by_position": bins([0.0, 1.0, *powers[1:]], 0.3),
        "by_rollout_probability": bins([0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0], 0.8),
        "by_entropy": bins([0.0, 0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, None], 0.01),
        "by_length": bins([*powers, None], 0.02),
        "by_token": [TokenRow(11 + i, text, 70 + i, divergences(0.2, 0.05)) for i, text in enumerate((*hostile, None))],
        "by_group": [category(name, 0.3, None) for name in hostile],
        "impulses": impulses(),
        "routing": Routing(5019, 0.987, 321, divergences(0.001), divergences(0.02)),
        "worst": [worst(i, text) for i, text in enumerate(hostile)],
    }


def widths(scale: float, num_tokens: int, n: int) -> tuple[dict[str, Quantiles], dict[str, Quantiles]]:
    """Of tokens, and of the sequences' maxima."""
    names = ("kl_width", "tv_width")
    largest = {f"seq_max_{name}": quantiles(2 * scale, n) for name in names}
    return {name: quantiles(scale, num_tokens) for name in names}, largest


def full_summary(hostile: tuple[str, ...] = HOSTILE) -> AuditSummary:
    """A summary with every block filled.

    Args:
        hostile: what stands where an audit shows names and texts of the data.
    """
    low = MeanInterval(0.0299, -0.0532, 0.1131, 100)
    run = run_with_floor() | {"trm_audit": "0.1.0", "model": hostile[0], "trainer_version": 200}
    return AuditSummary(
        verdict="163 of 400 sequences kept (40.75 %): max: kl <= 0.05 (exact). Largest exact KL 8.424 nats.",
        evidence="Exact: the whole distribution of both policies is known at every sampled context.",
        num_warnings=2,
        warnings=[
            Finding("low_acceptance", "40.75 % of the sequences are kept.", 163, 400, "sequences"),
            Finding("several_policy_versions", f"Mixed versions in {hostile[1]}.", 12, 400, "sequences"),
        ],
        notes=["Only the contexts that were sampled were seen.", f"Note on {hostile[2]}."],
        counts=Counts(400, {"exact": 400}, {"sampling": 400}, 5019, 100, 0, 3, 1, 0, 0, 4096),
        run=run,
        criteria=["max: kl <= 0.05 (exact)", "mean: kl <= 0.002 (exact)"],
        thresholds=Thresholds(delta_max=0.05, max_of="kl", delta_avg=0.002, avg_of="kl"),
        noise_floor=noise_floor([run], [("seq_max_kl", 0.05)]),
        n_kept=163,
        acceptance=0.4075,
        reasons={"seq_mean_kl_above_delta_avg": 233, "seq_max_kl_above_delta_max": 196},
        violations=Violations("seq_max_kl", 0.05, Share(400, 196, 0.49, 0.5323), Share(100, 52, 0.52, 0.6059)),
        tokens={name: quantiles(0.05, 5019) for name in ("kl", "tv", "k2", "k3", "abs_log_ratio", "ratio")},
        sequences={
            f"seq_{k}_{d}": quantiles(1.0, 400) for k in ("max", "mean", "sum") for d in ("kl", "k2", "k3", "tv")
        },
        bound_widths={
            "sketch": BoundWidths(0.95, {"64": 41}, {"1": 40, "7": 1}, *widths(0.03, 601, 41)),
            "interval": BoundWidths(None, {}, {}, *widths(2.5, 702, 43)),
        },
        evidence_worth=evidence_worth([{"evidence_worth": worth_of()}], 0.05, "kl"),
        **acceptance(),  # type: ignore[arg-type]
        d_max={"seq_max_kl": 31.4159, "seq_max_tv": 0.99},
        d_seq={"seq_sum_kl": SequenceTotal(MeanInterval(0.5509, 0.2814, 0.8205, 100), "95 %, cluster-robust")},
        bounds={
            "all": {
                "exact": bounds_block(60.0, "from exact divergences", Bound(-1.37, -0.67)),
                "sampled": bounds_block(300.0, "an estimate from sampled tokens"),
            },
            "kept": {"exact": bounds_block(2.0, "from exact divergences; conditional on the kept sequences")},
        },
        rewards=Rewards(400, 0.0, 1.0, 1.0, "assumed [0, 1]", low, -0.0201),
        ppo=PpoTerms(0.2, 5019, 37, 82),
        token_masking=TokenMasking("seq_max_kl", 0.05, 5019, 401, 0.0799, 8.424, 8.424),
        **parts(hostile),  # type: ignore[arg-type]
    )
