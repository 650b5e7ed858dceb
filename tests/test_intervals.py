"""Bounds from top-K evidence: do they always contain the truth, and are they as tight as the evidence allows?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import Tensor

from trm_audit.numerics.divergences import divergences, row_statistics
from trm_audit.numerics.intervals import Intervals, intervals
from trm_audit.numerics.rows import torch_only

STEPS = {torch.float16: 2.0**-11, torch.float32: 2.0**-24}


@pytest.fixture(scope="module", params=["compiled", "torch"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every claim here is made of the compiled code, where there is a compiler, and of the torch code."""
    with torch_only() if request.param == "torch" else nullcontext():
        yield


@dataclass(frozen=True)
class Case:
    """n rows of two policies and what a top-K list keeps of the first.

    Attributes:
        logp: [n, V] float64 log-probabilities of pi_roll.
        trainer: [n, V] float32 logits of pi_theta.
        ids: [n, K + 1], the list and the sampled token.
        stored: [n, K + 1] their stored log-probabilities, -inf for a sampled token that the list holds already.
        dtype: of the stored values.
    """

    logp: Tensor
    trainer: Tensor
    ids: Tensor
    stored: Tensor
    dtype: torch.dtype

    @property
    def logq(self) -> Tensor:
        return self.trainer.log_softmax(1)

    @property
    def k(self) -> int:
        return self.ids.shape[1] - 1

    def bounds(self) -> Intervals:
        return intervals(self.trainer, self.ids, self.stored, self.stored[:, self.k - 1], STEPS[self.dtype])

    def exact(self) -> tuple[Tensor, Tensor]:
        found = divergences(self.logp, self.trainer.double())
        return found.kl, found.tv


def case(rollout: Tensor, trainer: Tensor, k: int, dtype: torch.dtype, seed: int) -> Case:
    """Evidence of rollout logits [n, V] against trainer logits [n, V]; the sampled token is drawn from the first."""
    logp = rollout.double().log_softmax(1)
    top = logp.topk(k, dim=1)
    rng = torch.Generator().manual_seed(seed)
    sampled = torch.multinomial(logp.exp(), 1, generator=rng)
    listed = (top.indices == sampled).any(1, keepdim=True)
    own = torch.where(listed, -torch.inf, logp.gather(1, sampled).float().double())
    ids = torch.cat([top.indices, torch.where(listed, top.indices[:, :1], sampled)], 1)
    values = torch.cat([top.values.to(dtype).double(), own], 1)
    return Case(logp, trainer.float(), ids, values, dtype)


def shape(name: str, n: int, vocab: int, rng: torch.Generator) -> Tensor:
    """Logits [n, vocab] of one kind."""
    noise = torch.randn(n, vocab, generator=rng)
    if name == "flat":
        return noise * 0.01
    if name == "ties":
        return (noise * 2).round()
    if name == "uniform":
        return torch.zeros(n, vocab)
    if name == "peaked":
        return noise + 25 * torch.nn.functional.one_hot(torch.randint(vocab, (n,), generator=rng), vocab)
    return noise * {"natural": 3.0, "sharp": 10.0}[name]


SHAPES = ("natural", "flat", "sharp", "ties", "uniform", "peaked")


def contained(one: Case) -> None:
    bounds, (kl, tv) = one.bounds(), one.exact()
    for name in ("kl_lower", "kl_upper", "tv_lower", "tv_upper"):
        assert bool(getattr(bounds, name).isnan().logical_not().all()), name
    assert bool((bounds.kl_lower <= kl).all()), (bounds.kl_lower - kl).max()
    assert bool((kl <= bounds.kl_upper).all()), (kl - bounds.kl_upper).max()
    assert bool((bounds.tv_lower <= tv).all()), (bounds.tv_lower - tv).max()
    assert bool((tv <= bounds.tv_upper).all()), (tv - bounds.tv_upper).max()
    assert bool((bounds.kl_lower >= 0).all())
    assert bool((bounds.tv_lower >= 0).all())
    assert bool((bounds.tv_upper <= 1).all())


@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("rollout_shape", SHAPES)
@pytest.mark.parametrize("vocab", [2, 3, 20, 300, 5000])
def test_bounds_contain_the_exact_values(vocab: int, rollout_shape: str, dtype: torch.dtype) -> None:
    """8 rows of 5 values of K, 7 trainers each: 16,800 pairs over all parameters."""
    rng = torch.Generator().manual_seed(vocab)
    rollout = shape(rollout_shape, 8, vocab, rng)
    near = [rollout + distance * torch.randn(8, vocab, generator=rng) for distance in (0.0, 1e-3, 0.1, 2.0)]
    far = [shape(name, 8, vocab, rng) for name in ("natural", "uniform", "peaked")]
    ks = sorted({1, 2, min(8, vocab), vocab // 2 or 1, vocab})
    for seed, (k, trainer) in enumerate(product(ks, near + far)):
        contained(case(rollout, trainer, k, dtype, seed))


@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("nucleus", [1, 3, 10])
def test_bounds_contain_the_exact_values_of_truncated_rollouts(nucleus: int, dtype: torch.dtype) -> None:
    # GIVEN processed rollouts: nothing outside a nucleus, and lists that stop inside it, at its edge
    rng = torch.Generator().manual_seed(nucleus)
    raw = shape("natural", 30, 200, rng)
    rollout = raw.masked_fill(raw < raw.topk(nucleus, dim=1).values[:, -1:], -torch.inf)
    for k in range(1, nucleus + 1):
        for seed, trainer in enumerate([raw, raw + 0.5 * torch.randn(30, 200, generator=rng), rollout]):
            contained(case(rollout, trainer, k, dtype, seed))


def test_the_lower_bound_is_data_processing_and_the_tv_bounds_are_their_formulas() -> None:
    rng = torch.Generator().manual_seed(1)
    rollout = shape("natural", 50, 400, rng)
    one = case(rollout, rollout + torch.randn(50, 400, generator=rng), 10, torch.float32, 1)
    bounds, there = one.bounds(), one.stored > -torch.inf
    p = torch.where(there, one.stored, -torch.inf).exp()
    q = torch.where(there, one.logq.double().gather(1, one.ids).exp(), 0.0)
    r, s = 1 - p.sum(1), 1 - q.sum(1)
    parts = torch.where(there, p * (p / q).log(), 0.0).sum(1) + r * (r / s).log()
    gap = (p - q).abs().sum(1)
    torch.testing.assert_close(bounds.kl_lower, parts, rtol=1e-3, atol=3e-4)
    torch.testing.assert_close(bounds.tv_lower, (gap + (r - s).abs()) / 2, rtol=0, atol=5e-5)
    torch.testing.assert_close(bounds.tv_upper, (gap + r + s) / 2, rtol=0, atol=5e-5)
    assert bool((bounds.kl_lower <= parts).all())


@pytest.mark.parametrize(("r", "floor"), [(0.35, 0.1), (0.3, 0.1), (0.05, 0.1), (0.4, 0.2)])
def test_the_upper_bound_is_the_kl_of_the_worst_tail_that_fits(r: float, floor: float) -> None:
    # GIVEN two known tokens, the smaller of probability p_min = floor, and four tail tokens
    known = [1 - r - floor, floor]
    q = np.array([0.3, 0.2, 0.25, 0.15, 0.07, 0.03])
    # WHEN the tail's mass stands where the trainer has least: floor each, the remainder on the next
    worst, left = [0.0] * 4, r
    for place in (3, 2, 1, 0):
        worst[place] = min(floor, left)
        left -= worst[place]
    p = np.array([*known, *worst])
    attained = float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
    # THEN that is the bound, and it is attained
    stored = torch.tensor([known], dtype=torch.float64).log()
    bounds = intervals(torch.tensor(np.log(q)[None]).float(), torch.tensor([[0, 1]]), stored, stored[:, 1], 0.0)
    assert attained <= float(bounds.kl_upper) < attained + 5e-4


def test_no_allocation_of_the_tail_exceeds_the_upper_bound() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        # GIVEN a vocabulary of 7 of which 2 are known, and any tail that respects p_min
        q, p = rng.dirichlet(np.full(7, 0.5)), -np.sort(-rng.dirichlet(np.full(7, 2.0)))
        stored = torch.tensor(p[None, :2]).log()
        logq = torch.tensor(np.log(np.maximum(q, 1e-12))[None]).float()
        bounds = intervals(logq, torch.tensor([[0, 1]]), stored, stored[:, 1], 2.0**-24)
        for tail in (p[2:], rng.permutation(p[2:])):
            whole = torch.tensor(np.concatenate([p[:2], tail])[None])
            kl = float(divergences(whole.log(), logq.double()).kl)
            assert float(bounds.kl_lower) <= kl <= float(bounds.kl_upper)


@pytest.mark.parametrize("dtype", STEPS)
def test_a_list_of_the_whole_vocabulary_leaves_only_rounding_open(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(3)
    rollout = shape("natural", 40, 50, rng)
    one = case(rollout, rollout + 0.3 * torch.randn(40, 50, generator=rng), 50, dtype, 3)
    bounds, (kl, tv) = one.bounds(), one.exact()
    allowed = 0.02 if dtype is torch.float16 else 5e-4
    assert bool((bounds.kl_upper - bounds.kl_lower < allowed).all())
    assert bool((bounds.tv_upper - bounds.tv_lower < allowed).all())
    contained(one)
    torch.testing.assert_close(bounds.kl_upper, kl, rtol=0, atol=allowed)
    torch.testing.assert_close(bounds.tv_upper, tv, rtol=0, atol=allowed)


def test_widths_shrink_as_k_grows() -> None:
    rng = torch.Generator().manual_seed(4)
    rollout = shape("natural", 60, 1000, rng)
    trainer = rollout + 0.2 * torch.randn(60, 1000, generator=rng)
    found = [case(rollout, trainer, k, torch.float32, 4).bounds() for k in (1, 4, 16, 64, 256, 1000)]
    for coarse, fine in pairwise(found):
        assert bool((fine.kl_upper <= coarse.kl_upper + 1e-3).all())
        assert bool((fine.kl_lower >= coarse.kl_lower - 1e-3).all())
        assert bool((fine.tv_upper - fine.tv_lower <= coarse.tv_upper - coarse.tv_lower + 1e-4).all())
    widths = [float((one.kl_upper - one.kl_lower).mean()) for one in found]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 1e-3 < 0.1 < widths[0]


def test_a_stored_value_of_lower_precision_gives_wider_bounds() -> None:
    rng = torch.Generator().manual_seed(5)
    rollout = shape("natural", 40, 300, rng)
    trainer = rollout + 0.2 * torch.randn(40, 300, generator=rng)
    half, single = (case(rollout, trainer, 300, dtype, 5).bounds() for dtype in (torch.float16, torch.float32))
    assert float((half.kl_upper - half.kl_lower).mean()) > 5 * float((single.kl_upper - single.kl_lower).mean())


@pytest.mark.parametrize("off", [-1.5e-5, 1.5e-5])
def test_an_engine_whose_probabilities_do_not_quite_sum_to_one_is_forgiven(off: float) -> None:
    # GIVEN values that a float32 normaliser moved: probabilities that sum to 1.000015, as engines were seen to give
    rng = torch.Generator().manual_seed(8)
    rollout = shape("natural", 40, 100, rng)
    for k, distance in product((10, 99, 100), (0.0, 0.01, 1.0)):
        one = case(rollout, rollout + distance * torch.randn(40, 100, generator=rng), k, torch.float32, 8)
        contained(replace(one, stored=one.stored + off))


def test_a_sampled_token_outside_the_list_sharpens_the_bounds() -> None:
    rng = torch.Generator().manual_seed(6)
    rollout = shape("natural", 80, 300, rng)
    one = case(rollout, rollout + torch.randn(80, 300, generator=rng), 5, torch.float32, 6)
    outside = one.stored[:, -1] > -torch.inf
    assert 10 < int(outside.sum()) < 80
    forgotten = Case(one.logp, one.trainer, one.ids, one.stored.clone(), one.dtype)
    forgotten.stored[:, -1] = -torch.inf
    with_it, without = one.bounds(), forgotten.bounds()
    assert bool((with_it.kl_lower >= without.kl_lower - 1e-4)[outside].all())
    assert bool((with_it.kl_upper <= without.kl_upper + 1e-4)[outside].all())


def test_a_trainer_that_excludes_a_listed_token_is_infinitely_far() -> None:
    stored = torch.tensor([[0.5, 0.3]], dtype=torch.float64).log()
    logq = torch.tensor([[1.0, -torch.inf, 0.5, 0.2]]).log_softmax(1)
    bounds = intervals(logq, torch.tensor([[0, 1]]), stored, stored[:, 1], 2.0**-24)
    assert float(bounds.kl_lower) == float(bounds.kl_upper) == math.inf
    assert float(bounds.tv_upper) <= 1


def test_a_trainer_that_excludes_the_whole_tail_is_infinitely_far_only_where_the_tail_certainly_has_mass() -> None:
    logq, ids = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log(), torch.tensor([[0, 1]])
    heavy, whole = (torch.tensor([[0.6, rest]], dtype=torch.float64).log() for rest in (0.3, 0.4))
    assert float(intervals(logq, ids, heavy, heavy[:, 1], 2.0**-24).kl_lower) == math.inf
    bounds = intervals(logq, ids, whole, whole[:, 1], 2.0**-24)
    assert 0.02 < float(bounds.kl_lower) <= 0.6 * math.log(1.2) + 0.4 * math.log(0.8)


def test_a_tail_that_underflows_under_the_trainer_is_very_far_but_not_infinitely() -> None:
    # GIVEN a trainer whose tail has e^-300 each, which is 0 in float32
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64)
    logq = torch.tensor([[0.0, -1.0, -300.0, -300.0]]).log_softmax(1)
    bounds = intervals(logq, torch.tensor([[0, 1]]), p[:, :2].log(), p[:, 1].log(), 2.0**-24)
    exact = float((p * (p.log() - logq.double())).sum())
    assert 59 < float(bounds.kl_lower) <= exact <= float(bounds.kl_upper) < 60


def test_rows_with_lists_of_different_length_are_bounded_as_if_alone() -> None:
    rng = torch.Generator().manual_seed(7)
    rollout = shape("natural", 2, 100, rng)
    trainer = rollout + torch.randn(2, 100, generator=rng)
    wide = case(rollout, trainer, 9, torch.float32, 7)
    short = wide.stored.clone()
    short[1, 3:] = -torch.inf
    floor = torch.stack([short[0, 8], short[1, 2]])
    together = intervals(wide.logq, wide.ids, short, floor, 2.0**-24)
    alone = intervals(wide.logq[1:], wide.ids[1:, :3], short[1:, :3], floor[1:], 2.0**-24)
    for one in fields(Intervals):
        torch.testing.assert_close(getattr(together, one.name)[1:], getattr(alone, one.name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_type_and_constant_and_a_known_normaliser_give_the_same_bounds(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(9)
    rollout = shape("natural", 20, 3000, rng)
    one = case(rollout, rollout + 0.5 * torch.randn(20, 3000, generator=rng), 64, torch.float16, 9)
    logits = one.trainer.to(dtype)
    rest = one.ids, one.stored, one.stored[:, one.k - 1], STEPS[one.dtype]
    plain = intervals(logits.double().log_softmax(1), *rest)
    given = intervals(logits, *rest, row_statistics(logits).logsumexp)
    for found in (given, intervals(logits, *rest), intervals(logits.float() + 8.0, *rest)):
        for bound in fields(Intervals):
            torch.testing.assert_close(getattr(found, bound.name), getattr(plain, bound.name), rtol=2e-5, atol=1e-5)


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    stored = torch.tensor([[0.5, 0.3]], dtype=torch.float64).log()
    with pytest.raises(ValueError, match="vocabulary of 4"):
        intervals(torch.zeros(1, 4), torch.tensor([[0, 4]]), stored, stored[:, 1], 2.0**-24)
