"""k1, k2, k3 of sampled tokens against arithmetic with many digits, and what they estimate."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trm_audit.numerics.estimators import sampled_divergences

getcontext().prec = 60


def of(log_ratio: float) -> dict[str, float]:
    return {name: float(values[0]) for name, values in sampled_divergences(np.array([log_ratio])).items()}


@pytest.mark.parametrize(("ratio", "k3"), [(0.01, 3.615), (100.0, 94.39)])
def test_a_hundredfold_ratio_gives_the_published_numbers_in_either_direction(ratio: float, k3: float) -> None:
    found = of(math.log(ratio))
    assert found["k3"] == pytest.approx(k3, abs=0.005)
    assert found["abs_log_ratio"] == pytest.approx(4.605, abs=0.0005)
    assert found["ratio"] == pytest.approx(ratio)


def test_k1_of_a_ratio_and_of_its_inverse_cancel_where_k3_does_not() -> None:
    found = sampled_divergences(np.log([0.01, 100.0]))
    assert found["k1"].sum() == pytest.approx(0.0, abs=1e-12)
    assert found["k3"].sum() > 98


@pytest.mark.parametrize(("rollout", "trainer", "ratio"), [(0.9, 0.001, 0.00111), (0.001, 0.9, 900.0)])
def test_the_ratio_is_trainer_over_rollout(rollout: float, trainer: float, ratio: float) -> None:
    found = of(math.log(trainer) - math.log(rollout))
    assert found["ratio"] == pytest.approx(ratio, rel=2e-3)
    assert found["k1"] == pytest.approx(math.log(rollout / trainer))


@pytest.mark.parametrize("log_ratio", [-1e-4, -1e-9, 1e-4, 1e-9, 3e-7, -0.3, 2.0, -30.0, 30.0])
def test_k3_keeps_its_digits_near_zero(log_ratio: float) -> None:
    lr = Decimal(log_ratio)
    assert of(log_ratio)["k3"] == pytest.approx(float(lr.exp() - 1 - lr), rel=1e-6, abs=0)


@given(st.floats(-700, 700))
def test_k3_is_never_negative_and_the_others_follow_from_the_log_ratio(log_ratio: float) -> None:
    found = of(log_ratio)
    assert found["k3"] >= 0
    assert found["k1"] == -log_ratio
    assert found["k2"] == log_ratio * log_ratio / 2
    assert found["abs_log_ratio"] == abs(log_ratio)
    assert found["log_ratio"] == log_ratio


def test_k3_is_never_negative_where_every_digit_is_lost() -> None:
    tiny = np.concatenate([[s * 10.0**-e for e in range(1, 300)] for s in (-1, 1)])
    assert (sampled_divergences(tiny)["k3"] >= 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_expectation_of_k3_and_of_k1_under_the_rollout_policy_is_the_exact_kl(seed: int) -> None:
    # GIVEN two policies over three tokens
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3))
    exact = float((p * np.log(p / q)).sum())
    # WHEN each token is weighed by how often the rollout policy samples it
    found = sampled_divergences(np.log(q) - np.log(p))
    # THEN both estimators are unbiased, k2 is not
    assert float((p * found["k3"]).sum()) == pytest.approx(exact, rel=1e-9)
    assert float((p * found["k1"]).sum()) == pytest.approx(exact, rel=1e-9)
    assert float((p * found["ratio"]).sum()) == pytest.approx(1.0)


def test_k3_of_a_truncated_rollout_policy_falls_short_by_the_trainers_mass_outside() -> None:
    p, q = np.array([0.6, 0.4]), np.array([0.5, 0.3])  # the trainer's other .2 lies outside the nucleus
    exact = float((p * np.log(p / q)).sum())
    assert float((p * sampled_divergences(np.log(q / p))["k3"]).sum()) == pytest.approx(exact - 0.2)


def test_a_token_that_one_side_excludes_is_infinitely_far() -> None:
    excluded_by_trainer, excluded_by_rollout = of(-math.inf), of(math.inf)
    assert excluded_by_trainer["ratio"] == 0.0
    assert excluded_by_rollout["ratio"] == math.inf
    for name in ("k2", "k3", "abs_log_ratio"):
        assert excluded_by_trainer[name] == excluded_by_rollout[name] == math.inf
    assert excluded_by_trainer["k1"] == math.inf
    assert excluded_by_rollout["k1"] == -math.inf


def test_what_is_missing_stays_missing() -> None:
    assert all(math.isnan(value) for value in of(math.nan).values())
