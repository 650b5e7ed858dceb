"""KL both ways, total variation and entropies against float64, over every shape of distribution a model can give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, logsumexp
from scipy.stats import entropy
from torch import Tensor

from trm_audit.numerics.divergences import TokenDivergences, divergences, row_statistics
from trm_audit.numerics.rows import torch_only


@pytest.fixture(scope="module", params=["compiled", "torch"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every claim here is made of the compiled code, where there is a compiler, and of the torch code."""
    with torch_only() if request.param == "torch" else nullcontext():
        yield


FIELDS = ("kl", "kl_reverse", "tv", "rollout_entropy", "trainer_entropy")


def reference(rollout: Tensor, trainer: Tensor) -> dict[str, np.ndarray]:
    """The definitions, row by row in float64: 0 log 0 = 0, and p > 0 = q is infinite."""
    out: dict[str, list[float]] = {name: [] for name in FIELDS}
    for a, b in zip(rollout.double().numpy(), trainer.double().numpy(), strict=True):
        log_p, log_q = log_softmax(a), log_softmax(b)
        out["kl"].append(kl(log_p, log_q))
        out["kl_reverse"].append(kl(log_q, log_p))
        out["tv"].append(float(np.abs(np.exp(log_p) - np.exp(log_q)).sum() / 2))
        out["rollout_entropy"].append(entropy(np.exp(log_p)))
        out["trainer_entropy"].append(entropy(np.exp(log_q)))
    return {name: np.array(values) for name, values in out.items()}


def kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """sum (q - p - p x), each term of which is non-negative; by series where x is small."""
    there = np.isfinite(log_p)
    if np.isneginf(log_q[there]).any():
        return math.inf
    p, q, x = np.exp(log_p[there]), np.exp(log_q[there]), log_q[there] - log_p[there]
    terms = np.where(np.abs(x) < 1, p * (np.expm1(np.clip(x, -1, 1)) - x), q - p - p * x)
    return float(terms.sum() + np.exp(log_q[~there]).sum())


def agree(found: TokenDivergences, wanted: dict[str, np.ndarray], rtol: float, atol: float = 1e-9) -> None:
    """KL by relative error alone; the others are of order one, so an absolute error speaks for them."""
    for name in ("kl", "kl_reverse"):
        np.testing.assert_allclose(
            getattr(found, name).numpy(), wanted[name], rtol=rtol, atol=atol * rtol, err_msg=name
        )
    for name in ("tv", "rollout_entropy", "trainer_entropy"):
        np.testing.assert_allclose(getattr(found, name).numpy(), wanted[name], rtol=2e-6, atol=5e-6, err_msg=name)


def pairs(n: int, vocab: int, sharpness: float, distance: float, seed: int) -> tuple[Tensor, Tensor]:
    """n pairs of float32 logits [n, vocab] whose KL grows with the square of `distance`."""
    rng = torch.Generator().manual_seed(seed)
    base = torch.randn(n, vocab, generator=rng) * sharpness
    return base, base + distance * torch.randn(n, vocab, generator=rng)


@pytest.mark.parametrize("vocab", [2, 3, 1000, 50000])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
def test_kl_is_right_to_1e_4_from_1e_6_to_100_and_to_1e_2_down_to_1e_9(vocab: int, sharpness: float) -> None:
    covered = []
    for seed, distance in enumerate([3e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0, 20.0]):
        rollout, trainer = pairs(3 if vocab > 1000 else 12, vocab, sharpness, distance, seed)
        found, wanted = divergences(rollout, trainer), reference(rollout, trainer)
        for name in ("kl", "kl_reverse"):
            value, exact = getattr(found, name).numpy(), wanted[name]
            error = np.abs(value - exact) / exact
            assert error[(exact >= 1e-6) & (exact <= 100)].max(initial=0) < 1e-4, (name, distance)
            assert error[(exact >= 1e-9) & (exact < 1e-6)].max(initial=0) < 1e-2, (name, distance)
            covered.append(exact)
    spread = np.concatenate(covered)
    assert spread.min() < 1e-8
    assert spread.max() > 10


@pytest.mark.parametrize("vocab", [3, 1000, 50000])
@pytest.mark.parametrize("distance", [1e-4, 1e-2, 1.0, 10.0])
def test_every_figure_agrees_with_its_definition_in_float64(vocab: int, distance: float) -> None:
    rollout, trainer = pairs(3 if vocab > 1000 else 20, vocab, 3.0, distance, seed=1)
    agree(divergences(rollout, trainer), reference(rollout, trainer), rtol=1e-2 if distance < 0.1 else 1e-4)


@pytest.mark.parametrize(("distance", "rtol"), [(3e-6, 3e-3), (3e-5, 3e-4), (3e-4, 3e-5)])
def test_total_variation_keeps_its_digits_where_it_is_small(distance: float, rtol: float) -> None:
    rollout, trainer = pairs(12, 1000, 1.0, distance, seed=12)
    trainer[:, ::7] += 2 * distance
    wanted = reference(rollout, trainer)["tv"]
    assert wanted.max() < distance
    np.testing.assert_allclose(divergences(rollout, trainer).tv.numpy(), wanted, rtol=rtol)


def test_float64_logits_are_computed_in_float64() -> None:
    rollout, trainer = (logits.double() for logits in pairs(10, 300, 2.0, 1e-4, seed=2))
    agree(divergences(rollout, trainer), reference(rollout, trainer), rtol=1e-8)


def test_one_side_in_half_precision_is_compared_in_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        # GIVEN stored halves and a float32 trainer
        rollout, trainer = pairs(10, 2000, 3.0, 0.1, seed=3)
        stored = rollout.to(dtype)
        # THEN the figures are those of the stored values, not of what they were rounded from
        agree(divergences(stored, trainer), reference(stored, trainer), rtol=1e-4)
        agree(divergences(trainer, stored), reference(trainer, stored), rtol=1e-4)


def test_identical_logits_give_zero_everywhere() -> None:
    for seed, vocab in enumerate([1, 2, 3, 1000, 50000]):
        logits = 10 * torch.randn(9, vocab, generator=torch.Generator().manual_seed(seed))
        found = divergences(logits, logits.clone())
        for name in ("kl", "kl_reverse", "tv"):
            assert getattr(found, name).tolist() == [0.0] * 9, name


def test_a_vocabulary_of_one_token_has_no_divergence_and_no_entropy() -> None:
    found = divergences(torch.tensor([[3.0]]), torch.tensor([[-7.0]]))
    assert [float(getattr(found, name)) for name in FIELDS] == [0.0] * 5


def test_no_rows_give_no_figures() -> None:
    found = divergences(torch.zeros(0, 7), torch.zeros(0, 7))
    assert all(getattr(found, name).shape == (0,) for name in FIELDS)
    assert row_statistics(torch.zeros(0, 7)).entropy.shape == (0,)


@pytest.mark.parametrize(("constant", "rtol"), [(1.0, 1e-4), (100.0, 1e-3), (1e4, 0.02)])
def test_constants_added_to_a_row_change_nothing_beyond_their_own_rounding(constant: float, rtol: float) -> None:
    """Adding c to a float32 rounds it to 6e-8 c: at 1e4 by up to 5e-4, which is 1 % of a distance of 0.05."""
    rollout, trainer = pairs(20, 500, 2.0, 0.05, seed=4)
    plain, shifted = divergences(rollout, trainer), divergences(rollout + constant, trainer - constant)
    for name in FIELDS:
        torch.testing.assert_close(getattr(shifted, name), getattr(plain, name), rtol=rtol, atol=1e-5 * rtol)


def test_constants_that_rounding_spares_change_nothing_at_all() -> None:
    rng = torch.Generator().manual_seed(5)
    rollout, trainer = (torch.randint(-64, 64, (20, 50), generator=rng) / 8.0 for _ in range(2))
    plain, shifted = divergences(rollout, trainer), divergences(rollout + 4096.0, trainer - 1024.0)
    assert all(torch.equal(getattr(plain, name), getattr(shifted, name)) for name in FIELDS)


def test_the_trainers_mass_outside_a_truncated_support_counts() -> None:
    # GIVEN a nucleus of two tokens and a trainer that gives the third a tenth
    rollout, trainer = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.45, 0.45, 0.1]]).log()
    found = divergences(rollout, trainer)
    # THEN KL is log(.5/.45), not the .0054 of the two kept terms alone
    assert float(found.kl) == pytest.approx(math.log(0.5 / 0.45), rel=1e-5)
    assert float(found.kl) == pytest.approx(0.1054, abs=5e-5)
    assert float(found.kl_reverse) == math.inf
    assert float(found.tv) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("low", [-200.0, -1e4])
def test_probabilities_that_underflow_keep_their_part_of_kl(low: float) -> None:
    """exp(-200) is 0 in float32, but log q = -200 is not: KL = .5 (200 - log 2) and so on."""
    rollout = torch.tensor([[0.0, 0.0, low], [0.0, low, low], [0.0, 0.0, 0.0]])
    trainer = torch.tensor([[0.0, low, 0.0], [low, 0.0, low], [0.0, low, 2 * low]])
    agree(divergences(rollout, trainer), reference(rollout, trainer), rtol=1e-6)


def test_disjoint_supports_are_infinitely_far_and_of_total_variation_one() -> None:
    rollout, trainer = torch.tensor([[0.3, 0.7, 0.0, 0.0]]).log(), torch.tensor([[0.0, 0.0, 0.6, 0.4]]).log()
    found = divergences(rollout, trainer)
    assert float(found.kl) == float(found.kl_reverse) == math.inf
    assert float(found.tv) == pytest.approx(1.0, rel=1e-6)


def test_a_token_that_both_sides_exclude_changes_nothing() -> None:
    rollout, trainer = pairs(6, 40, 2.0, 0.3, seed=6)
    out = torch.full((6, 3), -torch.inf)
    plain = divergences(rollout, trainer)
    with_out = divergences(torch.cat([rollout, out], 1), torch.cat([trainer, out], 1))
    for name in FIELDS:
        torch.testing.assert_close(getattr(with_out, name), getattr(plain, name), rtol=1e-6, atol=1e-9)


def test_infinite_rows_do_not_reach_their_neighbours() -> None:
    rollout, trainer = pairs(17, 30, 2.0, 0.3, seed=7)
    plain = divergences(rollout, trainer).kl
    trainer[8, 4] = -torch.inf
    found = divergences(rollout, trainer).kl
    assert float(found[8]) == math.inf
    rest = [row for row in range(17) if row != 8]
    assert torch.equal(found[rest], plain[rest])


def test_a_row_without_a_distribution_is_not_a_number() -> None:
    found = divergences(torch.full((1, 4), -torch.inf), torch.zeros(1, 4))
    assert math.isnan(float(found.kl))


def test_rollout_comes_first_and_the_trainer_second() -> None:
    # GIVEN a token of probability .9 under the rollout policy and .001 under the trainer
    rollout, trainer = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.001, 0.999]]).log()
    found = divergences(rollout, trainer)
    assert float(found.kl) == pytest.approx(0.9 * math.log(0.9 / 0.001) + 0.1 * math.log(0.1 / 0.999), rel=1e-5)
    assert float(found.kl_reverse) == pytest.approx(0.001 * math.log(0.001 / 0.9) + 0.999 * math.log(9.99), rel=1e-5)
    # THEN rho = pi_theta / pi_roll is .00111, not 900
    sampled = torch.tensor([0])
    log_ratio = row_statistics(trainer, sampled).logprobs - row_statistics(rollout, sampled).logprobs
    assert float(log_ratio.exp()) == pytest.approx(0.00111, abs=5e-6)


def test_rows_are_independent_of_the_rows_they_are_computed_with() -> None:
    rollout, trainer = pairs(37, 700, 3.0, 0.2, seed=8)
    together = divergences(rollout, trainer)
    for row in (0, 7, 8, 36):
        alone = divergences(rollout[row : row + 1], trainer[row : row + 1])
        for name in FIELDS:
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[row], rtol=1e-6, atol=1e-12)


logits_rows = arrays(
    np.float32,
    (4, 7),
    elements=st.one_of(
        st.floats(-80, 80, width=32),
        st.floats(-2, 2, width=32),
        st.just(-math.inf),
        st.sampled_from([-1e4, -200.0, 0.0]),
    ),
).filter(lambda rows: np.isfinite(rows).any(1).all())


@settings(max_examples=150, deadline=None)
@given(logits_rows, logits_rows)
def test_divergences_are_never_negative_and_obey_pinsker(rollout: np.ndarray, trainer: np.ndarray) -> None:
    found = divergences(torch.from_numpy(rollout), torch.from_numpy(trainer))
    for name in FIELDS:
        assert bool((getattr(found, name) >= 0).all()), name
    assert bool((found.tv <= 1).all())
    for one in (found.kl, found.kl_reverse):
        assert bool((found.tv <= (one / 2).sqrt() * (1 + 1e-5) + 1e-7).all())
    agree(found, reference(torch.from_numpy(rollout), torch.from_numpy(trainer)), rtol=1e-3, atol=1e-4)


def test_log_probabilities_and_entropies_agree_with_float64() -> None:
    logits = pairs(21, 5000, 4.0, 0.0, seed=9)[0]
    logits[3, 100:] = -torch.inf
    ids = torch.randint(0, 100, (21,), generator=torch.Generator().manual_seed(9))
    wanted = log_softmax(logits.double().numpy(), axis=1)
    found = row_statistics(logits, ids)
    np.testing.assert_allclose(found.logprobs.numpy(), wanted[np.arange(21), ids], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(found.entropy.numpy(), entropy(np.exp(wanted), axis=1), rtol=2e-6)
    np.testing.assert_allclose(found.logsumexp.numpy(), logsumexp(logits.double().numpy(), axis=1), rtol=2e-7)
    assert row_statistics(logits.bfloat16(), ids).logprobs.dtype == torch.float64


def test_a_token_of_probability_zero_has_a_log_probability_of_minus_infinity() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, -torch.inf, 1.0]])
    found = row_statistics(logits, torch.tensor([1, 2])).logprobs
    assert found[0] == -torch.inf
    assert found[1].item() == pytest.approx(1 - math.log(1 + math.e), abs=1e-7)


def test_one_visit_gives_what_each_row_has_by_itself_too() -> None:
    rollout, trainer = pairs(21, 3000, 3.0, 0.3, seed=10)
    rollout[2, :2000] = -torch.inf
    ids = torch.randint(0, 3000, (21,), generator=torch.Generator().manual_seed(10))
    # GIVEN the float16 that is stored, against the trainer's float32
    stored = rollout.half()
    found = divergences(stored, trainer, ids)
    for side, logits in (("rollout", stored), ("trainer", trainer)):
        alone = row_statistics(logits, ids)
        for name, value in (("logprobs", alone.logprobs), ("entropy", alone.entropy), ("logsumexp", alone.logsumexp)):
            torch.testing.assert_close(getattr(found, f"{side}_{name}"), value, rtol=1e-6, atol=1e-6)
        wanted = log_softmax(logits.double().numpy(), axis=1)[np.arange(21), ids]
        np.testing.assert_allclose(getattr(found, f"{side}_logprobs").numpy(), wanted, rtol=1e-6, atol=2e-6)
    assert bool(divergences(stored, trainer).trainer_logprobs.isnan().all())


@pytest.mark.parametrize("place", [0, 700, 1023, 1024, 2999])
@pytest.mark.parametrize("defect", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_row_that_is_not_a_distribution_shows_in_its_log_sum_exp(
    dtype: torch.dtype, defect: float, place: int
) -> None:
    # GIVEN a defect in row 1 of the rollout side and row 3 of the trainer's, and rows 2 and 4 that are all -inf
    rollout, trainer = (logits.to(dtype) for logits in pairs(6, 3000, 2.0, 0.3, seed=11))
    ids = torch.tensor([0, 0, 1, 700, 1024, 2999])
    rollout[1, place] = trainer[3, place] = defect
    rollout[2], trainer[4] = -torch.inf, -torch.inf
    found = divergences(rollout, trainer, ids)
    # THEN exactly those say so, each on its own side
    assert found.rollout_logsumexp.isfinite().tolist() == [True, False, False, True, True, True]
    assert found.trainer_logsumexp.isfinite().tolist() == [True, True, True, False, False, True]
    for name in ("kl", "kl_reverse", "tv"):
        assert getattr(found, name).isnan().tolist() == [False, True, True, True, True, False]
    for name in ("logprobs", "entropy"):
        assert getattr(found, f"rollout_{name}").isnan().tolist() == [False, True, True, False, False, False]
        assert getattr(found, f"trainer_{name}").isnan().tolist() == [False, False, False, True, True, False]
    alone = row_statistics(trainer, ids)
    assert torch.equal(alone.logsumexp.isfinite(), found.trainer_logsumexp.isfinite())


def test_shapes_and_ids_that_do_not_fit_are_refused() -> None:
    logits, ids = torch.zeros(2, 5), torch.tensor([1, 2])
    for wrong in (torch.tensor([1, 5]), torch.tensor([-1, 0]), torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match="ids"):
            divergences(logits, logits, wrong)
        with pytest.raises(ValueError, match="ids"):
            row_statistics(logits, wrong)
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 4\)"):
        divergences(logits, logits[:, :4], ids)
    assert divergences(logits, logits, ids.int()).kl.tolist() == [0, 0]
