"""What a recorded sketch says of any pair of distributions, against float64: never false where it is certain, and
elsewhere wrong no more often than it says. Evidence is as a shard holds it: float16 lists and vectors."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, chi2
from torch import Tensor

from trm_audit.numerics.sketch import Sketch
from trm_audit.numerics.sketch_bounds import SketchBounds, chi_square_factors, compare_sketch
from trm_audit.record.evidence import Recipe, evidence
from trm_audit.rollout import Sampling

Floats = NDArray[np.float64]
Pair = tuple[Tensor, Tensor]
HALF = 2.0**-11
NEVER = 1 - 1e-9
"""A confidence at which not one of the pairs of this file should miss."""
KINDS = ("natural", "flat", "sharp", "zipf", "ties", "uniform", "peaked", "one token", "few tokens", "excluded", "tiny")
RELATIONS = ("near", "far", "equal", "disjoint", "permuted", "one moved", "tail lost", "list lost")


def distribution(kind: str, vocab: int, rng: np.random.Generator) -> Floats:
    """Logits [V] of one kind; those of probability 0 are -inf."""
    noise, at = rng.standard_normal(vocab), int(rng.integers(vocab))
    if kind == "zipf":
        return rng.permutation(-1.2 * np.log(np.arange(1, vocab + 1)))
    if kind == "ties":
        return np.round(noise)
    if kind == "peaked":
        return np.where(np.arange(vocab) == at, noise + 22, noise)
    if kind == "one token":
        return np.where(np.arange(vocab) == at, 0.0, -np.inf)
    if kind == "few tokens":
        return np.where(noise >= np.sort(noise)[-min(3, vocab)], 2 * noise, -np.inf)
    if kind == "excluded":
        return np.where((rng.random(vocab) < 0.5) | (np.arange(vocab) == at), 2 * noise, -np.inf)
    if kind == "tiny":  # a tail that neither float16 nor float32 can hold
        return np.where(np.arange(vocab) == at, 0.0, noise - rng.choice([17.0, 80.0, 400.0, 70_000.0]))
    return noise * {"natural": 3.0, "flat": 0.01, "sharp": 12.0, "uniform": 0.0}[kind]


def related(rollout: Floats, relation: str, rng: np.random.Generator) -> Floats:
    """A trainer's logits, in some relation to the sampler's; at least one is finite."""
    vocab = len(rollout)
    if relation == "near":
        return rollout + 10 ** rng.uniform(-4, 0) * rng.standard_normal(vocab)
    if relation == "far":
        return distribution(str(rng.choice(KINDS)), vocab, rng)
    if relation == "permuted":
        return rng.permutation(rollout)
    if relation == "one moved":
        return rollout + np.where(np.arange(vocab) == rng.integers(vocab), rng.choice([-4.0, -0.1, 0.1, 4.0]), 0.0)
    first = np.argsort(-rollout, kind="stable")
    gone = {"disjoint": rollout > -np.inf, "tail lost": rollout < rollout[first[min(5, vocab - 1)]]}
    gone |= {"list lost": np.arange(vocab) == first[0], "equal": np.zeros(vocab, dtype=bool)}
    if relation == "disjoint" and gone[relation].all():
        gone[relation] = rng.permutation(vocab) < vocab / 2
    trainer = np.where(gone[relation], -np.inf, np.where(np.isneginf(rollout), 0.0, rollout))
    return trainer if np.isfinite(trainer).any() else np.zeros(vocab)


def tensors(*logits: Floats) -> list[Tensor]:
    """Rows of one each, float32 as engines have them."""
    return [torch.from_numpy(one)[None].float() for one in logits]


def log_probabilities(logits: Tensor) -> Floats:
    """[V] float64 in plain numpy."""
    values = logits[0].double().numpy()
    shifted = values - values.max()
    out: Floats = shifted - math.log(math.fsum(np.exp(shifted)))
    return out


def exact(rollout: Tensor, trainer: Tensor) -> tuple[float, float]:
    """KL and TV; KL in the form that has no cancellation."""
    log_p, log_q = log_probabilities(rollout), log_probabilities(trainer)
    p, q = np.exp(log_p), np.exp(log_q)
    there = log_p > -np.inf
    if (there & np.isneginf(log_q)).any():
        return math.inf, math.fsum(np.abs(p - q)) / 2
    x = log_q[there] - log_p[there]
    with np.errstate(over="ignore", invalid="ignore"):
        terms = np.where(x < 1, p[there] * (np.expm1(x) - x), q[there] - p[there] - p[there] * x)
    return math.fsum(terms) + math.fsum(q[~there]), math.fsum(np.abs(p - q)) / 2


def recorded(logits: Tensor, recipe: Recipe, sampling: Sampling | None = None, token: int | None = None) -> Sketch:
    """What a recorder keeps of the first and most probable token, or of another one."""
    drawn = int(logits[0].argmax()) if token is None else token
    kept = evidence(logits, [drawn], sampling or Sampling(), recipe)
    return Sketch(kept.topk_ids, kept.topk_logprobs, kept.vectors, kept.tail_mass.double(), kept.entropy.double())


def compare(known: Sketch, trainer: Tensor, seed: int, confidence: float) -> SketchBounds:
    """A sequence of one position."""
    return compare_sketch(
        known, trainer, seed=seed, positions=np.ones(1, dtype=np.int64), step=HALF, confidence=confidence
    )


def kl_missed(found: SketchBounds, kl: float) -> bool:
    slack = 1e-13 if math.isfinite(kl) else 0.0
    return not float(found.kl_lower) <= kl + slack or not float(found.kl_upper) >= kl - slack


def never_false(found: SketchBounds, kl: float, tv: float) -> None:
    """What holds at any confidence: TV from below, infinities, ranges and order."""
    lower, estimate, upper = (float(x) for x in (found.kl_lower, found.kl_estimate, found.kl_upper))
    assert 0 <= lower <= estimate <= upper
    assert float(found.tv_lower) <= tv + 1e-13
    assert 0 <= float(found.tv_lower) <= float(found.tv_upper) <= 1
    assert float(found.hellinger2) >= 0
    if kl == math.inf:
        assert upper == math.inf
    if math.inf in (lower, estimate):
        assert kl == math.inf


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Recipe]:
    """Logits of two policies, [1, V] each, and a recipe; K reaches beyond V."""
    vocab = draw(st.one_of(st.integers(2, 9), st.integers(10, 300), st.sampled_from([1023, 1024, 5000])))
    seed = draw(st.integers(0, 2**62))
    rng = np.random.default_rng(seed)
    rollout = distribution(draw(st.sampled_from(KINDS)), vocab, rng)
    trainer = related(rollout, draw(st.sampled_from(RELATIONS)), rng)
    k = draw(st.sampled_from([1, 2, 20, 64, vocab - 1, vocab, vocab + 7]))
    return *tensors(rollout, trainer), Recipe(k, draw(st.sampled_from([64, 100, 256])), seed)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_bounds_of_what_was_recorded_contain_the_exact_values(case: tuple[Tensor, Tensor, Recipe]) -> None:
    rollout, trainer, recipe = case
    kl, tv = exact(rollout, trainer)
    known = recorded(rollout, recipe)
    found = compare(known, trainer, recipe.seed, NEVER)
    never_false(found, kl, tv)
    assert not kl_missed(found, kl)
    assert float(found.tv_upper) >= tv - 1e-13
    # and what is certain is so when next to nothing is asked of the projection
    never_false(compare(known, trainer, recipe.seed, 1e-6), kl, tv)


@pytest.mark.parametrize("vocab", [32_000, 200_000])
def test_bounds_hold_for_large_vocabularies_of_every_kind(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for number, kind in enumerate(KINDS):
        rollout, trainer = distribution(kind, vocab, rng), RELATIONS[number % len(RELATIONS)]
        one, other = tensors(rollout, related(rollout, trainer, rng))
        kl, tv = exact(one, other)
        found = compare(recorded(one, Recipe(20, 64, 5)), other, 5, NEVER)
        never_false(found, kl, tv)
        assert not kl_missed(found, kl)
        assert float(found.tv_upper) >= tv - 1e-13


def test_pairs_of_every_kind_miss_no_more_often_than_the_confidence_leaves() -> None:
    """Each pair has a seed of its own, so that misses are independent and count against a binomial."""
    rng = np.random.default_rng(99)
    combinations, confidences = [*product(KINDS, RELATIONS)] * 2, (0.3, 0.8, 0.95)
    missed = np.zeros((len(confidences), 2), dtype=int)
    for seed, (kind, relation) in enumerate(combinations):
        rollout = distribution(kind, int(rng.integers(2, 400)), rng)
        one, other = tensors(rollout, related(rollout, relation, rng))
        kl, tv = exact(one, other)
        known = recorded(one, Recipe(4, 64, seed))
        for count, confidence in zip(missed, confidences, strict=True):
            found = compare(known, other, seed, confidence)
            never_false(found, kl, tv)
            count += [kl_missed(found, kl), float(found.tv_upper) < tv - 1e-13]
    for count, confidence in zip(missed, confidences, strict=True):
        assert (count <= binom.ppf(0.9999, len(combinations), 1 - confidence)).all()


def swapped(vocab: int) -> Pair:
    """Two levels of probability, swapped between the policies: |sqrt p - sqrt q| is the same share of sqrt p + sqrt q
    everywhere, so that nothing is lost between the tails' distance and their TV."""
    high = np.arange(vocab) % 2 == 0
    one, other = tensors(np.where(high, 0.6, 0.0), np.where(high, 0.0, 0.6))
    return one, other


def lowered(vocab: int) -> Pair:
    """Uniform, and with a few tokens lowered by e^3: all of KL is at the least ratio, so that nothing is lost between
    the tails' distance and its largest quotient."""
    few = np.arange(vocab) < vocab // 40
    one, other = tensors(np.zeros(vocab), np.where(few[::-1], -3.0, 0.0))
    return one, other


@pytest.mark.parametrize(("name", "pair"), [("tv", swapped(300)), ("kl", lowered(600))], ids=["tv", "kl"])
def test_upper_bounds_miss_as_often_as_they_say_where_nothing_else_is_lost(name: str, pair: Pair) -> None:
    # GIVEN a pair for which a bound is as wide as the limit of the distance makes it, and 200 draws of R
    draws, confidences = 200, (0.5, 0.8)
    truth = dict(zip(("kl", "tv"), exact(*pair), strict=True))[name]
    count = np.zeros(len(confidences), dtype=int)
    for seed in range(draws):
        known = recorded(pair[0], Recipe(1, 64, seed))
        count += [float(getattr(compare(known, pair[1], seed, one), f"{name}_upper")) < truth for one in confidences]
    # THEN it misses in half of what the confidence leaves, or a little less often
    half = (1 - np.array(confidences)) / 2
    assert (count <= binom.ppf(0.9999, draws, half)).all()
    assert (count >= binom.ppf(0.0001, draws, 0.6 * half)).all()


FEW = ([1] * 3, [1] * 4, [1] * 6, [1] * 8, [2, 1, 1], [3, 1, 1, 1], [4, 3, 2, 1], [1, 0.5, 0.25], [1, 1, 0.1], [5, 1])


@pytest.mark.parametrize("difference", FEW, ids=str)
@pytest.mark.parametrize("m", [64, 256])
def test_the_chi_square_holds_for_differences_of_a_few_tokens_by_their_exact_law(
    difference: list[float], m: int
) -> None:
    """The law of m h / truth is the m-fold convolution of one column's, here on a grid, rounded against us."""
    x = np.array(difference) / np.linalg.norm(difference)
    column = np.square([np.dot(sign, x) for sign in product((-1, 1), repeat=len(x))])
    cells = 1 << 17
    step = 4 * m / cells
    outside = 10.0 ** -np.arange(1, 9)
    for side in ("low", "high"):
        rounded = np.floor(column / step + 1e-9) if side == "low" else np.ceil(column / step - 1e-9)
        law = np.bincount(rounded.astype(int), minlength=cells) / len(column)
        law = np.fft.irfft(np.fft.rfft(law[:cells]) ** m, cells)
        for share in outside:
            if side == "low":  # measured so small that the upper limit is below the truth
                probability = law[: math.floor(chi2.ppf(share, m) / step)].sum()
            else:
                probability = law[math.ceil(chi2.isf(share, m) / step) :].sum()
            assert probability <= share * (1 + 1e-6) + 1e-12
    low, high = chi_square_factors(m, np.ones(1, dtype=np.int64), 1 - 2 * float(outside[2]))
    assert (m / low[0], m / high[0]) == pytest.approx((chi2.isf(outside[2], m), chi2.ppf(outside[2], m)))


def nucleus(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Floats:
    """Logits of the truncated policy by a plain loop in float64: top-k, then the smallest set that reaches top-p."""
    values = logits[0].double().numpy() / temperature
    order = np.argsort(-values, kind="stable")[: top_k if top_k > 0 else None]
    p = np.exp(values[order] - values[order[0]])
    p, reached, kept = p / p.sum(), 0.0, []
    for token, mass in zip(order, p, strict=True):
        if reached >= top_p:
            break
        kept.append(token)
        reached += mass
    out = np.full(len(values), -np.inf)
    out[kept] = values[kept]
    return out


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.7, 0.9, -1), (1.3, 0.95, 50), (1.0, 1.0, 7), (1.0, 0.5, -1)]
)
def test_a_truncating_sampler_is_audited_as_what_it_drew_from(temperature: float, top_p: float, top_k: int) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, logprobs_mode="raw")
    for number, kind in enumerate(("natural", "flat", "zipf", "sharp", "natural")):
        rng = np.random.default_rng(number)
        logits = distribution(kind, 1500, rng)
        raw, model = tensors(logits, logits + 0.1 * rng.standard_normal(1500))
        truncated, trainer = torch.from_numpy(nucleus(raw, temperature, top_p, top_k))[None], model / temperature
        kl, tv = exact(truncated, trainer)
        known = recorded(raw, Recipe(20, 64, number), sampling)
        found = compare(known, trainer, number, NEVER)
        never_false(found, kl, tv)
        assert not kl_missed(found, kl)
        assert float(found.tv_upper) >= tv - 1e-13
        # THEN a nucleus that fits into the list is known whole, and nothing is left to a projection
        if int(truncated.isfinite().sum()) <= 20:
            assert float(known.tail_mass) == 0
            assert float(found.kl_upper - found.kl_lower) < 1e-2 * kl + 1e-3
            assert float(found.tv_upper - found.tv_lower) < 4e-3


@pytest.mark.parametrize("vocab", [2, 3, 17, 64])
def test_a_list_as_long_as_the_vocabulary_leaves_nothing_but_its_own_rounding(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for kind, relation in product(KINDS, ("near", "far", "equal")):
        rollout = distribution(kind, vocab, rng)
        one, other = tensors(rollout, related(rollout, relation, rng))
        kl, tv = exact(one, other)
        found = compare(recorded(one, Recipe(max(vocab, 64), 64, 1)), other, 1, NEVER)
        never_false(found, kl, tv)
        assert not kl_missed(found, kl)
        assert float(found.tv_upper - found.tv_lower) < 4e-3


def test_tails_from_ordinary_to_far_below_float32_keep_infinities_and_bounds() -> None:
    # GIVEN a sampler whose tail has e^-reach of its mass, and trainers that have, or exclude, that tail
    for reach in (1.0, 10.0, 30.0, 90.0, 300.0, 2000.0):
        rollout = np.concatenate([[0.0], np.linspace(-reach - 1, -reach, 50)])
        for trainer in (np.zeros(51), np.concatenate([[0.0], np.full(50, -np.inf)])):
            one, other = tensors(rollout, trainer)
            kl, tv = exact(one, other)
            known = recorded(one, Recipe(1, 64, 3))
            found = compare(known, other, 3, NEVER)
            assert float(known.tail_mass) > 0
            never_false(found, kl, tv)
            assert not kl_missed(found, kl)
            assert float(found.tv_upper) >= tv - 1e-13
            assert (float(found.kl_lower) == math.inf) == (kl == math.inf)
