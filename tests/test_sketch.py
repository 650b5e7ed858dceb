"""Sketched distributions: the same signs everywhere, estimates without bias, bounds that hold as often as they say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, chi2
from torch import Tensor

from trm_audit.numerics import signs as signs_module
from trm_audit.numerics.divergences import row_statistics
from trm_audit.numerics.signs import project, signs
from trm_audit.numerics.sketch import Sketch, project_tail, sketch
from trm_audit.numerics.sketch_bounds import SketchBounds, chi_square_factors, compare_sketch

Floats = NDArray[np.float64]
STEPS = {torch.float16: 2.0**-11, torch.float32: 2.0**-24}
NEVER = 1 - 1e-9
"""A confidence at which not one of the pairs of this file should miss."""
SHAPES = ("natural", "flat", "sharp", "ties", "uniform", "peaked", "single", "truncated")


def hashed(vocab: int, m: int, seed: int) -> NDArray[np.int8]:
    """The signs as the specification has them, in numpy's unsigned arithmetic, which wraps by itself."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    z = np.arange(vocab * m, dtype=np.uint64) + np.multiply(np.array([seed % 2**64], np.uint64), golden) + golden
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.where(z >> np.uint64(63) == 1, 1, -1).astype(np.int8).reshape(vocab, m)


def one_sign(i: int, j: int, m: int, seed: int) -> int:
    """The same in integers of any size."""
    z = (i * m + j + seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return 1 if (z ^ (z >> 31)) >> 63 else -1


def shape(name: str, n: int, vocab: int, rng: torch.Generator) -> Tensor:
    """Logits [n, vocab] float32 of one kind."""
    noise = torch.randn(n, vocab, generator=rng)
    special = torch.nn.functional.one_hot(torch.randint(vocab, (n,), generator=rng), vocab)
    if name == "ties":
        return (noise * 2).round()
    if name == "peaked":
        return noise + 25 * special
    if name == "single":
        return torch.where(special > 0, 3.0, -torch.inf)
    if name == "truncated":
        return torch.where((torch.rand(n, vocab, generator=rng) < 0.3) | (special > 0), 3 * noise, -torch.inf)
    return noise * {"natural": 3.0, "flat": 0.01, "sharp": 10.0, "uniform": 0.0}[name]


def exact(rollout: Tensor, trainer: Tensor) -> dict[str, Floats]:
    """KL, TV and the squared Hellinger distance in float64."""
    p, q = (logits.double().softmax(1).numpy() for logits in (rollout, trainer))
    log_p, log_q = (logits.double().log_softmax(1).numpy() for logits in (rollout, trainer))
    with np.errstate(invalid="ignore"):
        kl = np.where(np.isneginf(log_p), 0.0, np.where(np.isneginf(log_q), np.inf, p * (log_p - log_q))).sum(1)
    return {"kl": kl, "tv": np.abs(p - q).sum(1) / 2, "hellinger2": np.square(np.sqrt(p) - np.sqrt(q)).sum(1)}


def compare(known: Sketch, trainer: Tensor, seed: int, **options: Any) -> SketchBounds:
    """Each row a sequence of one position unless said; log-probabilities stored as float32."""
    options = {"positions": np.ones(len(trainer), dtype=np.int64), "step": 2.0**-24, **options}
    return compare_sketch(known, trainer, seed=seed, **options)


def stored(known: Sketch, dtype: torch.dtype) -> Sketch:
    """As it comes back from a file with log-probabilities of a type."""
    return replace(known, topk_logprobs=known.topk_logprobs.to(dtype))


def missed(found: SketchBounds, truth: dict[str, Floats]) -> NDArray[np.bool_]:
    """Rows in which some bound does not hold, beyond what float64 rounds."""
    lower = (found.kl_lower.numpy() > truth["kl"] + 1e-13) | (found.tv_lower.numpy() > truth["tv"] + 1e-13)
    upper = (found.kl_upper.numpy() < truth["kl"] - 1e-13) | (found.tv_upper.numpy() < truth["tv"] - 1e-13)
    return lower | upper


def sound(found: SketchBounds) -> None:
    """Every figure is a number, in its range and its order."""
    for one in fields(SketchBounds):
        assert not bool(getattr(found, one.name).isnan().any()), one.name
        assert getattr(found, one.name).dtype == torch.float64
        assert bool((getattr(found, one.name) >= 0).all()), one.name
    assert bool((found.kl_lower <= found.kl_estimate).all())
    assert bool((found.kl_estimate <= found.kl_upper).all())
    assert bool((found.tv_lower <= found.tv_upper).all())
    assert bool((found.tv_upper <= 1).all())


# Signs


def test_the_signs_are_those_of_the_specification() -> None:
    found = signs(49152, 64, 1)
    assert found.dtype == torch.int8
    assert found[0, :8].tolist() == [-1, 1, 1, 1, 1, 1, -1, -1]
    assert found[49151, :8].tolist() == [1, -1, 1, -1, 1, -1, 1, 1]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63, 2**64 - 1])
@pytest.mark.parametrize(("vocab", "m"), [(1, 64), (2000, 64), (16385, 128), (333, 100)])
def test_torch_numpy_and_plain_integers_make_the_same_signs(vocab: int, m: int, seed: int) -> None:
    found = signs(vocab, m, seed).numpy()
    np.testing.assert_array_equal(found, hashed(vocab, m, seed))
    for i, j in {(0, 0), (0, m - 1), (vocab - 1, 0), (vocab - 1, m - 1), (vocab // 2, m // 3)}:
        assert found[i, j] == one_sign(i, j, m, seed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_makes_the_same_signs_sketches_and_bounds() -> None:
    assert torch.equal(signs(50_000, 128, 3, "cuda").cpu(), signs(50_000, 128, 3))
    rng = torch.Generator().manual_seed(0)
    rollout = shape("natural", 20, 50_000, rng)
    trainer = rollout + 0.1 * torch.randn(20, 50_000, generator=rng)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        here, there = sketch(rollout, 20, 128, 3), sketch(rollout.cuda(), 20, 128, 3)
        torch.testing.assert_close(there.vector.cpu(), here.vector, rtol=2e-3, atol=1e-6)
        bounds, same = compare(here, trainer, 3), compare(there, trainer.cuda(), 3)
    finally:
        torch.set_float32_matmul_precision(before)
    for one in fields(SketchBounds):
        torch.testing.assert_close(getattr(same, one.name).cpu(), getattr(bounds, one.name), rtol=5e-3, atol=1e-6)


def test_signs_are_balanced_and_columns_rows_and_seeds_look_unrelated() -> None:
    for seed, m in ((0, 64), (1, 64), (2, 128)):
        matrix = signs(20_000, m, seed).double()
        between = (matrix.T @ matrix / 20_000 - torch.eye(m)).abs().max()
        assert float(between) < 6 / math.sqrt(20_000)
        assert float(matrix.mean().abs()) < 5 / math.sqrt(20_000 * m)
        assert float((matrix * signs(20_000, m, seed + 1)).mean().abs()) < 5 / math.sqrt(20_000 * m)
        assert float((matrix[1:] * matrix[:-1]).mean().abs()) < 5 / math.sqrt(20_000 * m)


def test_matrices_are_kept_within_a_bound_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # GIVEN room for two matrices of 64 x 1000
    monkeypatch.setattr(signs_module, "CACHE_BYTES", 2 * 64_000)
    first, second = signs(1000, 64, 101), signs(1000, 64, 102)
    # WHEN the first one is used again, and a third one is made
    assert signs(1000, 64, 101) is first
    third = signs(1000, 64, 103)
    # THEN the one that was used longest ago is gone, and one that alone is too large is never kept
    assert signs(1000, 64, 101) is first
    assert signs(1000, 64, 103) is third
    assert signs(1000, 64, 102) is not second
    assert torch.equal(signs(1000, 64, 102), second)
    assert signs(3000, 64, 101) is not signs(3000, 64, 101)
    assert sum(one.nbytes for one in signs_module._kept.values()) <= 2 * 64_000


# Projections


@contextmanager
def precision(name: str) -> Iterator[None]:
    """What products of float32 matrices may be computed in."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("vocab", [5, 1024, 1025, 30_000])
@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_a_projection_is_that_of_float64_whatever_precision_products_may_have(vocab: int, allowed: str) -> None:
    rng = torch.Generator().manual_seed(vocab)
    values = torch.rand(7, vocab, generator=rng)
    values /= values.norm(dim=1, keepdim=True)
    wanted = values.double() @ torch.from_numpy(hashed(vocab, 64, 4)).double() / 8
    with precision(allowed):
        found = project(values, 64, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(project(values, 64, 4), found, rtol=0, atol=0)
    assert found.dtype == torch.float32
    assert float((found.double() - wanted).norm(dim=1).max()) < 2e-6


def test_where_products_are_not_float32_values_are_split_into_parts_that_bfloat16_holds() -> None:
    values = (
        torch.rand(50, 300, generator=torch.Generator().manual_seed(0)) * 10.0 ** -torch.arange(50)[:, None] / 1e-20
    )
    with precision("highest"):
        assert len(signs_module._parts(values)) == 1
    with precision("medium"):
        parts = signs_module._parts(values)
    assert len(parts) == 3
    assert all(torch.equal(part.bfloat16().float(), part) for part in parts)
    assert torch.equal(parts[0].double() + parts[1].double() + parts[2].double(), values.double())


# Sketches


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("name", SHAPES)
def test_a_sketch_is_what_it_says(name: str, temperature: float) -> None:
    rng = torch.Generator().manual_seed(1)
    logits = shape(name, 6, 700, rng)
    found = sketch(logits, 12, 64, 9, temperature)
    log_p = (logits.double() / temperature).log_softmax(1)
    p = log_p.exp().numpy()
    # THEN the list is the most probable tokens, which one of several alike is open
    torch.testing.assert_close(found.topk_logprobs.double(), log_p.topk(12, dim=1).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_p.gather(1, found.topk_ids), log_p.topk(12, dim=1).values, rtol=0, atol=1e-6)
    # and the others are in the vector, with their mass beside it
    rest = p.copy()
    np.put_along_axis(rest, found.topk_ids.numpy(), 0.0, axis=1)
    np.testing.assert_allclose(found.tail_mass.numpy(), rest.sum(1), rtol=2e-6, atol=0)
    vector = np.sqrt(rest) @ hashed(700, 64, 9).astype(np.float64) / 8
    np.testing.assert_allclose(found.vector.double().numpy(), vector, rtol=2**-11 + 1e-4, atol=2e-7)
    assert found.vector.dtype == torch.float16
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0.0).sum(1)
    np.testing.assert_allclose(found.entropy.numpy(), entropy, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sketches_do_not_depend_on_a_constant_the_batch_or_the_types_width(
    dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = shape("natural", 9, 800, torch.Generator().manual_seed(2)).to(dtype)
    found = sketch(logits, 5, 64, 1, temperature)
    wide = sketch(logits.double() + 1000.0, 5, 64, 1, temperature)
    monkeypatch.setattr("trm_audit.numerics.sketch.CPU_LOGITS", 1700)  # two rows at once
    parts = sketch(logits, 5, 64, 1, temperature)
    for other in (wide, parts):
        assert torch.equal(other.topk_ids, found.topk_ids)
        torch.testing.assert_close(other.vector, found.vector, rtol=2e-3, atol=1e-6)
        for name in ("topk_logprobs", "tail_mass", "entropy"):
            torch.testing.assert_close(getattr(other, name), getattr(found, name), rtol=2e-6, atol=2e-6)


def test_the_input_is_left_as_it_was() -> None:
    rollout, trainer = (shape("natural", 4, 300, torch.Generator().manual_seed(seed)) for seed in (3, 4))
    before = rollout.clone(), trainer.clone()
    compare(sketch(rollout, 5, 64, 1), trainer, 1)
    sketch(rollout, 5, 64, 1, 0.5)
    assert torch.equal(rollout, before[0])
    assert torch.equal(trainer, before[1])


def test_one_token_of_mass_one_and_a_list_of_the_whole_vocabulary_leave_no_tail() -> None:
    for known in (
        sketch(torch.tensor([[-torch.inf, 2.0, -torch.inf, -torch.inf]]), 2, 64, 1),
        sketch(torch.tensor([[0.3, 2.0, -1.0, 0.0]]), 4, 64, 1),
        sketch(torch.tensor([[0.3, 2.0, -1.0, 0.0]]), 100, 64, 1),
    ):
        assert float(known.tail_mass) == 0
        assert bool((known.vector == 0).all())
    assert known.topk_ids.tolist() == [[1, 0, 3, 2]]


def test_a_tail_too_small_for_a_float64_is_still_there() -> None:
    # GIVEN a token that the sampler has at e^-2000, and a trainer that excludes it
    known = sketch(torch.tensor([[2000.0, 0.0, 0.0]]), 1, 64, 1)
    assert 0 < float(known.tail_mass) < 1e-300
    # THEN the KL is infinite, as it is exactly
    found = compare(known, torch.tensor([[0.0, -torch.inf, -torch.inf]]), 1)
    assert float(found.kl_lower) == math.inf
    assert float(found.tv_upper) < 1e-4


@pytest.mark.parametrize("defect", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_no_distribution_gives_no_numbers_and_spoils_no_other(defect: float) -> None:
    logits = shape("natural", 3, 50, torch.Generator().manual_seed(5))
    trainer = logits + 0.1
    spoilt = logits.clone()
    spoilt[1] = defect
    known, clean = sketch(spoilt, 4, 64, 1), sketch(logits, 4, 64, 1)
    assert known.tail_mass.isnan().tolist() == known.entropy.isnan().tolist() == [False, True, False]
    bounds = compare(known, trainer, 1), compare(clean, spoilt, 1)
    for one, found in product(fields(SketchBounds), bounds):
        values = getattr(found, one.name)
        assert values.isnan().tolist() == [False, True, False], one.name
        torch.testing.assert_close(values[[0, 2]], getattr(compare(clean, trainer, 1), one.name)[[0, 2]])


def test_no_rows_give_none() -> None:
    known = sketch(torch.zeros(0, 10), 3, 64, 1)
    assert known.vector.shape == (0, 64)
    assert known.topk_ids.shape == (0, 3)
    assert compare(known, torch.zeros(0, 10), 1).kl_estimate.shape == (0,)


def test_what_is_out_of_range_is_refused() -> None:
    logits = torch.zeros(2, 10)
    for k, m, temperature in ((0, 64, 1.0), (1, 63, 1.0), (1, 64, 0.0), (1, 64, math.inf), (1, 64, math.nan)):
        with pytest.raises(ValueError, match="needed"):
            sketch(logits, k, m, 1, temperature)
    known = sketch(logits, 3, 64, 1)
    for options in ({"confidence": 1.0}, {"confidence": 0.0}, {"positions": np.array([0, 1])}):
        with pytest.raises(ValueError, match="at least"):
            compare(known, logits, 1, **options)
    with pytest.raises(ValueError, match="vocabulary of 5"):
        compare(replace(known, topk_ids=known.topk_ids + 5), logits[:, :5], 1)


# The law of the error


def tail_distances(seed: int, m: int, rollout: Tensor, trainer: Tensor, k: int) -> tuple[Floats, Floats]:
    """h as measured and as it is, of each row."""
    known = sketch(rollout, k, m, seed)
    tail = project_tail(trainer, known.topk_ids, m, seed)
    measured = (known.vector.double() / known.tail_mass.sqrt()[:, None] - tail.vector.double()).square().sum(1)
    p, q = (x.double().scatter(1, known.topk_ids, -torch.inf).softmax(1).sqrt() for x in (rollout, trainer))
    return measured.numpy(), (p - q).square().sum(1).numpy()


@pytest.mark.parametrize("k", [1, 20])
def test_the_distance_of_tails_has_no_bias_and_an_error_of_sqrt_2_over_m(k: int) -> None:
    rng = torch.Generator().manual_seed(6)
    rollout = shape("natural", 6, 800, rng)
    trainer = rollout + torch.tensor([0.01, 0.03, 0.1, 0.3, 1.0, 3.0])[:, None] * torch.randn(6, 800, generator=rng)
    for m, draws in ((64, 300), (256, 150), (1024, 60)):
        relative = []
        for seed in range(draws):
            measured, truth = tail_distances(seed, m, rollout, trainer, k)
            relative.append(measured / truth)
        off = np.array(relative) - 1
        error, expected = off.std(0), math.sqrt(2 / m)
        # THEN the mean is 1 within five of its standard errors, for the nearest row beside what float16 adds
        assert (np.abs(off.mean(0)) < 5 * expected / math.sqrt(draws) + np.array([2e-3, 5e-4, 0, 0, 0, 0])).all()
        # and the spread is a chi-square's or less, less where a few tokens make up the distance
        assert (error < expected * (1 + 4 / math.sqrt(2 * draws))).all()
        assert (error[:4] > 0.8 * expected).all()


def test_the_whole_squared_hellinger_distance_has_no_bias() -> None:
    rng = torch.Generator().manual_seed(7)
    rollout = shape("natural", 5, 1000, rng)
    trainer = rollout + torch.tensor([0.05, 0.2, 1.0, 3.0, 10.0])[:, None] * torch.randn(5, 1000, generator=rng)
    truth = exact(rollout, trainer)["hellinger2"]
    found = np.array([compare(sketch(rollout, 5, 64, s), trainer, s).hellinger2.numpy() for s in range(250)])
    error = found.std(0) / math.sqrt(250)
    assert (np.abs(found.mean(0) - truth) < 4.5 * error + 1e-6 * truth).all()
    assert (error < 0.02 * truth).all()


def test_limits_of_a_distance_miss_as_often_as_they_say() -> None:
    # GIVEN 600 independent draws of R, and a pair of tails that no few tokens dominate
    rng = torch.Generator().manual_seed(8)
    rollout = shape("natural", 1, 1500, rng)
    trainer = rollout + 0.2 * torch.randn(1, 1500, generator=rng)
    drawn = [tail_distances(seed, 64, rollout, trainer, 20) for seed in range(600)]
    measured, truth = (np.concatenate(values) for values in zip(*drawn, strict=True))
    for confidence in (0.8, 0.95, 0.99):
        low, high = (float(one[0]) for one in chi_square_factors(64, np.ones(1, dtype=np.int64), confidence))
        # THEN misses to either side are half of the rest, within binomial error
        for count in (int((truth < low * measured).sum()), int((truth > high * measured).sum())):
            least, most = binom.ppf([1e-4, 1 - 1e-4], 600, (1 - confidence) / 2)
            assert least <= count <= most


@pytest.mark.parametrize("m", [64, 128, 256])
def test_the_chi_square_holds_for_two_tokens_too_whose_error_is_least_like_one(m: int) -> None:
    # GIVEN a difference (d, -d): a column is either 0 or 2 d, so that m h / truth is twice a binomial
    for outside in 10.0 ** -np.arange(1, 11):
        low, high = (float(one[0]) for one in chi_square_factors(m, np.ones(1, dtype=np.int64), 1 - 2 * outside))
        assert binom.cdf(math.ceil(m / high / 2) - 1, m, 0.5) <= outside * (1 + 1e-6)
        assert binom.sf(math.floor(m / low / 2), m, 0.5) <= outside * (1 + 1e-6)


def test_the_factors_are_the_chi_squares_quantiles_shared_out_over_positions() -> None:
    positions = np.array([1, 300, 300, 32_768, 1])
    low, high = chi_square_factors(128, positions, 0.95)
    np.testing.assert_allclose(low, 128 / chi2.isf(0.025 / positions, 128), rtol=1e-10)
    np.testing.assert_allclose(high, 128 / chi2.ppf(0.025 / positions, 128), rtol=1e-10)


# Estimates and bounds


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Logits of two policies, [3, V] each, and a seed."""
    vocab = draw(st.one_of(st.integers(2, 12), st.integers(13, 400), st.sampled_from([1023, 1025, 4000])))
    seed = draw(st.integers(0, 2**32))
    rng = torch.Generator().manual_seed(seed)
    rollout = shape(draw(st.sampled_from(SHAPES)), 3, vocab, rng)
    how = draw(st.sampled_from(["near", "other", "disjoint", "equal"]))
    if how == "near":
        return (
            rollout,
            rollout + draw(st.sampled_from([1e-4, 0.01, 0.1, 1.0])) * torch.randn(3, vocab, generator=rng),
            seed,
        )
    if how == "other":
        return rollout, shape(draw(st.sampled_from(SHAPES)), 3, vocab, rng), seed
    if how == "disjoint":
        mine = torch.rand(3, vocab, generator=rng) < 0.5
        mine[:, 0], mine[:, 1] = True, False
        noise = torch.randn(3, vocab, generator=rng)
        return noise.masked_fill(~mine, -torch.inf), noise.masked_fill(mine, -torch.inf), seed
    return rollout, rollout.clone(), seed


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pairs(), st.sampled_from([1, 2, 8, 64]), st.sampled_from([64, 128]), st.sampled_from(list(STEPS)))
def test_bounds_contain_the_exact_values_of_any_pair(
    pair: tuple[Tensor, Tensor, int], k: int, m: int, dtype: torch.dtype
) -> None:
    rollout, trainer, seed = pair
    found = compare(stored(sketch(rollout, k, m, seed), dtype), trainer, seed, confidence=NEVER, step=STEPS[dtype])
    sound(found)
    assert not missed(found, exact(rollout, trainer)).any()


@pytest.mark.parametrize("vocab", [50_000, 200_000])
def test_bounds_contain_the_exact_values_with_large_vocabularies(vocab: int) -> None:
    rng = torch.Generator().manual_seed(vocab)
    rollout = torch.cat([shape(name, 1, vocab, rng) for name in SHAPES])
    noise = torch.randn(len(SHAPES), vocab, generator=rng)
    for trainer in (rollout + 0.1 * noise, rollout.roll(1, 0), rollout):
        found = compare(sketch(rollout, 20, 64, 11), trainer, 11, confidence=NEVER)
        sound(found)
        assert not missed(found, exact(rollout, trainer)).any()


def test_sequences_of_which_some_bound_misses_are_no_more_than_the_confidence_leaves() -> None:
    # GIVEN 200 draws of R, and for each 2 sequences of 12 positions, near and far
    rng = torch.Generator().manual_seed(12)
    rollout = shape("natural", 24, 600, rng)
    distance = torch.tensor([0.05, 0.7]).repeat_interleave(12)[:, None]
    trainer = rollout + distance * torch.randn(24, 600, generator=rng)
    truth, positions = exact(rollout, trainer), np.full(24, 12)
    counts = np.zeros(2, dtype=int)
    for seed in range(200):
        found = compare(sketch(rollout, 4, 64, seed), trainer, seed, positions=positions, confidence=0.95)
        counts += missed(found, truth).reshape(2, 12).any(1)
    assert (counts <= binom.ppf(0.9999, 200, 0.05)).all()


def by_the_formulas(
    rollout: Tensor, trainer: Tensor, k: int, m: int, seed: int, confidence: float
) -> dict[str, Floats]:
    """Estimate and bounds in numpy, row by row, as the page of formulas has them, nothing rounded or allowed for."""
    rows: list[dict[str, float]] = []
    matrix = hashed(rollout.shape[1], m, seed) / math.sqrt(m)
    for one, other in zip(rollout, trainer, strict=True):
        p, q = (x.double().softmax(0).numpy() for x in (one, other))
        listed, rest = np.split(np.argsort(-p, kind="stable"), [k])
        r, s = p[rest].sum(), q[rest].sum()
        a, b = (np.sqrt(x[rest]) @ matrix[rest] for x in (p, q))
        h = np.square(a / math.sqrt(r) - b / math.sqrt(s)).sum()
        g = np.square(a - b).sum()
        below, above = m / chi2.isf((1 - confidence) / 2, m), m / chi2.ppf((1 - confidence) / 2, m)
        h_low, h_high, g_high = h * below, min(2.0, h * above), min(r + s, g * above)
        base = (p[listed] * np.log(p[listed] / q[listed])).sum() + r * math.log(r / s)
        x = math.log(q[rest].min() / s) - min(0.0, math.log(p[listed].min() / r))
        gap = np.abs(p[listed] - q[listed]).sum()
        moved = abs(r - s) + min(r, s) * math.sqrt(h_high * (4 - h_high))
        rows.append(
            {
                "kl_estimate": base + 2 * r * h,
                "kl_lower": base - 2 * r * math.log(1 - h_low / 2),
                "kl_upper": base + r * h_high * (math.expm1(x) - x) / (1 - math.exp(x / 2)) ** 2,
                "tv_lower": (gap + abs(r - s)) / 2,
                "tv_upper": (gap + min(r + s, moved, math.sqrt(g_high * (2 * (r + s) - g_high)))) / 2,
                "hellinger2": np.square(np.sqrt(p[listed]) - np.sqrt(q[listed])).sum() + g,
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("distance", [0.1, 0.5, 1.0])
def test_estimate_and_bounds_are_their_formulas(distance: float) -> None:
    rng = torch.Generator().manual_seed(13)
    rollout = shape("natural", 30, 500, rng)
    trainer = rollout + distance * torch.randn(30, 500, generator=rng)
    wanted = by_the_formulas(rollout, trainer, 6, 128, 5, 0.95)
    found = compare(sketch(rollout, 6, 128, 5), trainer, 5)
    # THEN what is estimated is the same, and bounds are a little wider, by what rounding may have done
    for name, values in wanted.items():
        ours, allowed = getattr(found, name).numpy(), 0.04 if name in ("kl_lower", "kl_upper", "tv_upper") else 1e-3
        np.testing.assert_allclose(ours, values, rtol=allowed, atol=1e-4)
        assert "lower" not in name or (ours <= values).all()
        assert "upper" not in name or (ours >= values).all()


def test_the_estimate_is_near_the_exact_kl() -> None:
    rng = torch.Generator().manual_seed(14)
    rollout = shape("natural", 200, 5000, rng)
    for distance in (0.03, 0.3):
        trainer = rollout + distance * torch.randn(200, 5000, generator=rng)
        ratio = compare(sketch(rollout, 20, 128, 2), trainer, 2).kl_estimate.numpy() / exact(rollout, trainer)["kl"]
        assert abs(np.median(ratio) - 1) < 0.05
        assert np.percentile(np.abs(ratio - 1), 90) < 0.25


def test_more_numbers_make_narrower_bounds_and_more_positions_or_confidence_wider_ones() -> None:
    rng = torch.Generator().manual_seed(15)
    rollout = shape("natural", 40, 3000, rng)
    trainer = rollout + 0.2 * torch.randn(40, 3000, generator=rng)

    def widths(k: int, m: int, positions: int, confidence: float) -> tuple[float, float]:
        options: dict[str, Any] = {"positions": np.full(40, positions), "confidence": confidence}
        found = compare(sketch(rollout, k, m, 1), trainer, 1, **options)
        return float((found.kl_upper - found.kl_lower).mean()), float((found.tv_upper - found.tv_lower).mean())

    usual = widths(20, 128, 100, 0.95)
    assert max(np.divide(widths(20, 512, 100, 0.95), usual)) < 1
    assert max(np.divide(widths(80, 128, 100, 0.95), usual)) < 1
    assert min(np.divide(widths(20, 128, 10_000, 0.95), usual)) > 1
    assert min(np.divide(widths(20, 128, 100, 0.999), usual)) > 1


def test_equal_policies_are_zero_within_what_float16_hides() -> None:
    for name in SHAPES:
        logits = shape(name, 10, 2000, torch.Generator().manual_seed(16))
        found = compare(sketch(logits, 20, 128, 1), logits, 1, positions=np.full(10, 1000))
        assert float(found.kl_lower.max()) == 0
        assert float(found.kl_estimate.max()) < 1e-6
        assert float(found.hellinger2.max()) < 1e-6
        assert float(found.tv_lower.max()) == 0
        assert float(found.tv_upper.max()) < 2e-3


def test_policies_that_share_nothing_are_as_far_apart_as_can_be() -> None:
    rng = torch.Generator().manual_seed(17)
    noise, mine = torch.randn(4, 900, generator=rng), torch.arange(900) % 2 == 0
    rollout, trainer = noise.masked_fill(~mine, -torch.inf), noise.masked_fill(mine, -torch.inf)
    found = compare(sketch(rollout, 8, 64, 1), trainer, 1)
    assert bool((found.kl_lower == torch.inf).all())
    assert bool((found.kl_estimate == torch.inf).all())
    assert bool((found.tv_upper == 1).all())
    torch.testing.assert_close(found.hellinger2, torch.full((4,), 2.0, dtype=torch.float64), rtol=0.4, atol=0)


def test_a_trainer_that_excludes_a_listed_token_or_a_tail_that_is_there_is_infinitely_far() -> None:
    rollout = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    for excluded in ([0], [1], [2, 3]):
        trainer = torch.zeros(1, 4)
        trainer[0, excluded] = -torch.inf
        found = compare(sketch(rollout, 2, 64, 1), trainer, 1)
        assert float(found.kl_lower) == float(found.kl_estimate) == float(found.kl_upper) == math.inf
        assert not missed(found, exact(rollout, trainer)).any()
    # and one that excludes a part of the tail might be
    trainer = torch.tensor([[0.0, 0.0, 0.0, -torch.inf]])
    found = compare(sketch(rollout, 2, 64, 1), trainer, 1)
    assert float(found.kl_lower) < 5
    assert float(found.kl_upper) == math.inf


def test_a_tail_that_underflows_under_the_trainer_is_very_far_but_not_infinitely() -> None:
    rollout = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log()
    trainer = torch.tensor([[0.0, -1.0, -300.0, -300.0, -301.0]])
    found = compare(sketch(rollout, 2, 64, 1), trainer, 1)
    truth = exact(rollout, trainer)
    assert 58 < float(truth["kl"][0]) < 62
    assert not missed(found, truth).any()
    assert float(found.kl_lower) > 0.99 * float(truth["kl"][0])
    assert float(found.kl_upper) < 1.01 * float(truth["kl"][0])


@pytest.mark.parametrize("exponent", [3, 6, 9, 12, 15])
def test_a_tail_too_small_for_float16_widens_its_own_bounds_only(exponent: int) -> None:
    # GIVEN a token that takes all but a little, less than float16 can resolve at the end
    rng = torch.Generator().manual_seed(18)
    rollout, trainer = (shape("natural", 20, 400, rng) for _ in range(2))
    for logits in (rollout, trainer):
        logits[:, 0] = logits[:, 1:].logsumexp(1) + exponent * math.log(10)
    found = compare(sketch(rollout, 1, 64, 1), trainer, 1, confidence=NEVER)
    truth = exact(rollout, trainer)
    sound(found)
    assert not missed(found, truth).any()
    assert (found.kl_upper.numpy() - truth["kl"] < 60 * 10.0**-exponent + 1e-8).all()


@pytest.mark.parametrize("off", [-1.5e-5, 1.5e-5])
def test_values_that_an_engine_rounded_in_float32_are_forgiven(off: float) -> None:
    rng = torch.Generator().manual_seed(19)
    rollout = shape("natural", 40, 300, rng)
    known = sketch(rollout, 10, 64, 1)
    moved = replace(known, topk_logprobs=known.topk_logprobs + off, tail_mass=known.tail_mass * math.exp(off))
    for distance in (0.0, 0.01, 1.0):
        trainer = rollout + distance * torch.randn(40, 300, generator=rng)
        assert not missed(compare(moved, trainer, 1, confidence=NEVER), exact(rollout, trainer)).any()


def test_float16_log_probabilities_cost_width_and_nothing_else() -> None:
    rng = torch.Generator().manual_seed(20)
    rollout = shape("natural", 100, 1000, rng)
    known = sketch(rollout, 50, 128, 1)
    trainer = rollout + 0.05 * torch.randn(100, 1000, generator=rng)
    half = compare(stored(known, torch.float16), trainer, 1, confidence=NEVER, step=STEPS[torch.float16])
    single = compare(known, trainer, 1, confidence=NEVER)
    assert float((half.tv_upper - half.tv_lower).mean()) > float((single.tv_upper - single.tv_lower).mean())
    assert not missed(half, exact(rollout, trainer)).any()


def test_rows_with_lists_of_different_length_are_compared_as_if_alone() -> None:
    rng = torch.Generator().manual_seed(21)
    rollout = shape("natural", 2, 200, rng)
    trainer = rollout + torch.randn(2, 200, generator=rng)
    wide, short = sketch(rollout, 9, 64, 3), sketch(rollout, 4, 64, 3)
    ids, logp = wide.topk_ids.clone(), wide.topk_logprobs.clone()
    ids[1, 4:], logp[1, 4:] = 0, -torch.inf
    pick = {name: torch.stack([getattr(wide, name)[0], getattr(short, name)[1]]) for name in ("vector", "tail_mass")}
    together = compare(replace(wide, topk_ids=ids, topk_logprobs=logp, **pick), trainer, 3)
    for one in fields(SketchBounds):
        for row, alone in enumerate((wide, short)):
            wanted = getattr(compare(alone, trainer, 3), one.name)[row]
            torch.testing.assert_close(getattr(together, one.name)[row], wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_trainer_logits_of_any_type_constant_and_known_normaliser_give_the_same_bounds(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(22)
    rollout = shape("natural", 20, 2000, rng)
    logits = (rollout + 0.5 * torch.randn(20, 2000, generator=rng)).to(dtype)
    known = sketch(rollout, 20, 64, 1)
    plain = compare(known, logits.double().log_softmax(1), 1)
    given_mass = compare(known, logits, 1, logsumexp=row_statistics(logits).logsumexp)
    for found in (compare(known, logits, 1), given_mass, compare(known, logits.float() + 8.0, 1)):
        for one in fields(SketchBounds):
            torch.testing.assert_close(getattr(found, one.name), getattr(plain, one.name), rtol=1e-4, atol=1e-6)
