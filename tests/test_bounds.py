"""The bounds reproduce the theory's table and dominate the true error on trees small enough to enumerate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from trm_audit.numerics.bounds import BOUNDS, error_bounds, pinsker_marginal_closed_form

T = 4096

TABLE = [
    # classical, coupling, Pinsker-marginal, Pinsker-marginal TV, mixed, mixed TV, adaptive
    ({"kl_seq": 0.4096}, [1677.312, 113.838, 34.9461, 34.9461, 52.4288, 52.4288, 34.9461]),
    ({"kl_seq": 0.01}, [1677.312, 113.838, 34.9461, 34.9461, 8.192, 8.192, 34.9461]),
    (
        {"kl_seq": 0.01, "tv_max": 5e-3, "tv_seq": 0.05},
        [838.656, 79.910, 34.9461, 24.7106, 8.192, 4.096, 24.7106],
    ),
]


@pytest.mark.parametrize(("given", "expected"), TABLE)
def test_the_table_for_horizon_4096_and_delta_1e_4_is_reproduced(
    given: dict[str, float], expected: list[float]
) -> None:
    result = error_bounds(T, kl_max=1e-4, **given)
    assert list(result.bounds) == list(BOUNDS)
    # expected holds at most three digits after the point of the largest figures
    assert [b.published for b in result.bounds.values()] == pytest.approx(expected, rel=1e-5)


def test_sharp_is_half_of_published_everywhere() -> None:
    result = error_bounds(300, kl_max=2e-3, kl_seq=0.1, tv_max=0.01, tv_seq=0.1)
    assert all(b.sharp == b.published / 2 for b in result.bounds.values())


def test_caps_hold_at_delta_one() -> None:
    result = error_bounds(T, kl_max=1.0, kl_seq=1.0)
    assert result.bounds["pinsker_marginal_bound"].published == pytest.approx(11581.6, abs=0.05)
    assert result.bounds["mixed_bound"].published == pytest.approx(8192, rel=1e-12)


def test_the_closed_form_is_34_9525_and_never_below_the_sum() -> None:
    assert pinsker_marginal_closed_form(T, 1e-4) == pytest.approx(34.9525, abs=5e-5)
    for horizon, delta in ((1, 0.3), (2, 1e-3), (100, 0.02), (5000, 1e-6), (300, 4.0)):
        summed = error_bounds(horizon, kl_max=delta).bounds["pinsker_marginal_bound"].published
        assert summed <= pinsker_marginal_closed_form(horizon, delta)


def test_every_sum_equals_a_plain_loop() -> None:
    # GIVEN different numbers for everything, positions included
    horizon, delta, total, eps, total_tv = 57, 0.011, 0.2, 0.06, 0.25
    drift = np.random.default_rng(0).random(40) * eps
    result = error_bounds(horizon, kl_max=delta, kl_seq=total, tv_max=eps, tv_seq=total_tv, tv_by_position=drift)
    # WHEN the formulas are written out term by term
    root, steps = math.sqrt(delta / 2), range(1, horizon + 1)
    coupling = 4 * eps * math.fsum(min(1, (t - 1) * eps) for t in steps)
    marginal = math.fsum(min(1, math.sqrt((t - 1) * delta / 2)) for t in steps)
    future = [min(1, (horizon - t) * eps, math.sqrt((horizon - t) * delta / 2)) for t in steps]
    adaptive = 4 * math.fsum(d * f for d, f in zip(drift, future, strict=False))
    # THEN they agree
    expected = [
        2 * horizon * (horizon - 1) * eps**2,
        coupling,
        4 * root * marginal,
        4 * eps * marginal,
        4 * horizon * root * math.sqrt(total / 2),
        4 * horizon * eps * total_tv,
        adaptive,
    ]
    assert [b.published for b in result.bounds.values()] == pytest.approx(expected, rel=1e-12)


def test_tv_seq_is_the_smallest_of_what_is_known() -> None:
    drift = np.array([0.01, 0.02])
    assert error_bounds(9, kl_max=0.1, kl_seq=0.5, tv_by_position=drift).tv_seq == pytest.approx(0.03)
    assert error_bounds(9, kl_max=0.1, kl_seq=0.0002, tv_by_position=drift).tv_seq == pytest.approx(0.01)
    assert error_bounds(9, kl_max=0.1, kl_seq=0.5, tv_by_position=drift, tv_seq=0.02).tv_seq == 0.02
    assert error_bounds(900, kl_max=3.0).tv_seq == 1.0


def test_infinite_kl_leaves_the_capped_bounds_finite() -> None:
    result = error_bounds(10, kl_max=math.inf, kl_seq=math.inf)
    assert result.tv_max == result.tv_seq == 1.0
    assert all(math.isfinite(b.published) for b in result.bounds.values())
    # nothing precedes the first token: 9 of 10 terms are capped at 1
    assert result.bounds["pinsker_marginal_bound"].published == pytest.approx(4 * 9)


def test_tv_alone_is_enough() -> None:
    result = error_bounds(10, tv_max=0.01)
    assert result.kl_max == math.inf
    assert result.bounds["mixed_tv_bound"].published == pytest.approx(4 * 10 * 0.01 * 0.1)


def test_a_horizon_of_one_token_leaves_only_the_mixed_bounds() -> None:
    result = error_bounds(1, kl_max=0.02, kl_seq=0.02)
    values = {name: b.published for name, b in result.bounds.items()}
    assert values.pop("mixed_bound") == pytest.approx(4 * 0.1 * 0.1)
    assert values.pop("mixed_tv_bound") == pytest.approx(4 * 0.1 * 0.1)
    assert set(values.values()) == {0.0}


def test_equal_policies_have_error_bound_zero() -> None:
    assert {b.published for b in error_bounds(1000, kl_max=0.0).bounds.values()} == {0.0}


def test_reward_range_multiplies_every_bound() -> None:
    one, four = error_bounds(50, kl_max=0.01), error_bounds(50, kl_max=0.01, reward_range=4.0)
    for name in BOUNDS:
        assert four.bounds[name].published == pytest.approx(4 * one.bounds[name].published)


def test_the_sentence_says_plainly_when_the_bounds_are_vacuous() -> None:
    vacuous = error_bounds(T, kl_max=1e-4, kl_seq=0.01, tv_max=5e-3, tv_seq=0.05)
    assert vacuous.vacuous
    assert vacuous.minimum == "mixed_tv_bound"
    assert vacuous.sentence.startswith("Vacuous: even the smallest bound, mixed_tv_bound = 4.096 (sharp 2.048)")
    small = error_bounds(10, kl_max=1e-4)
    assert small.sentence.startswith("Informative:")
    assert not small.vacuous


def test_between_the_constants_only_the_sharp_form_is_called_informative() -> None:
    result = error_bounds(100, tv_max=0.06, tv_seq=0.06)
    assert result.bounds[result.minimum].sharp < 1 <= result.bounds[result.minimum].published
    assert result.sentence.startswith("Informative only in its sharp form")


@pytest.mark.parametrize(
    ("horizon", "given"),
    [
        (0, {"kl_max": 0.1}),
        (5, {}),
        (5, {"kl_max": -0.1}),
        (5, {"kl_max": math.nan}),
        (5, {"kl_max": 0.1, "reward_range": math.inf}),
        (5, {"kl_max": 0.1, "tv_by_position": np.ones(6)}),
        (5, {"kl_max": 0.1, "tv_by_position": np.array([math.nan])}),
    ],
)
def test_arguments_out_of_range_are_refused(horizon: int, given: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        error_bounds(horizon, **given)


def test_acceptance_of_rare_token_events_falls_with_length() -> None:
    kept = [(1 - 1e-4) ** t for t in (256, 1024, 4096, 8192, 16384)]
    assert [round(k, 3) for k in kept] == [0.975, 0.903, 0.664, 0.441, 0.194]


@dataclass(frozen=True)
class Tree:
    """Two policies and a reward on every response of `depth` tokens; token 0 ends a response early."""

    roll: list[np.ndarray]  # per step [contexts, V]
    theta: list[np.ndarray]
    reward: np.ndarray  # [V ** depth]
    live: list[np.ndarray]  # per step [contexts] False after the end

    @property
    def depth(self) -> int:
        return len(self.roll)


def random_tree(rng: np.random.Generator) -> Tree:
    size, depth = int(rng.integers(2, 4)), int(rng.integers(1, 6))
    spread = 10 ** rng.uniform(-2, 0.7)
    roll, theta, live = [], [], []
    alive = np.ones(1, dtype=bool)
    for _ in range(depth):
        logits = rng.normal(0, 1.5, (len(alive), size))
        p, q = softmax(logits), softmax(logits + spread * rng.normal(size=logits.shape))
        ended = np.eye(1, size)[0]
        roll.append(np.where(alive[:, None], p, ended))
        theta.append(np.where(alive[:, None], q, ended))
        live.append(alive)
        alive = (alive[:, None] & (np.arange(size) > 0)).ravel()
    leaves = size**depth
    reward = rng.random(leaves) if rng.random() < 0.5 else rng.integers(0, 2, leaves).astype(float)
    return Tree(roll, theta, reward, live)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def divergences(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL and TV of each row."""
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(p > 0, p * np.log(p / q), 0.0).sum(axis=1)
    return np.maximum(kl, 0.0), np.abs(p - q).sum(axis=1) / 2


@dataclass(frozen=True)
class Truth:
    """By enumeration: the error, and what the bounds are computed from."""

    error: float
    kl_max: float
    kl_seq: float
    tv_max: float
    tv_seq: float
    tv_by_position: np.ndarray


def enumerate_tree(tree: Tree) -> Truth:
    d_roll, d_theta, ratios = np.ones(1), np.ones(1), np.zeros(1)
    kl_max = tv_max = kl_seq = 0.0
    drift = []
    for p, q, live in zip(tree.roll, tree.theta, tree.live, strict=True):
        kl, tv = divergences(p, q)
        kl_max, tv_max = max(kl_max, kl.max()), max(tv_max, tv.max())
        kl_seq += float(d_roll @ kl)
        drift.append(float(d_roll @ tv))
        assert (tv[~live] == 0).all()
        rho = np.divide(q, p, out=np.ones_like(p), where=p > 0)
        ratios = (ratios[:, None] + rho - 1).ravel()
        d_roll, d_theta = (d_roll[:, None] * p).ravel(), (d_theta[:, None] * q).ravel()
    surrogate = float((d_roll * tree.reward * ratios).sum())
    error = abs(float((d_theta - d_roll) @ tree.reward) - surrogate)
    tv_seq = float(np.abs(d_theta - d_roll).sum() / 2)
    return Truth(error, kl_max, kl_seq, tv_max, tv_seq, np.array(drift))


def test_no_bound_is_below_the_true_error_on_enumerated_trees() -> None:
    rng = np.random.default_rng(7)
    closest = 0.0
    for _ in range(400):
        tree = random_tree(rng)
        truth = enumerate_tree(tree)
        known = {"kl_max": truth.kl_max, "kl_seq": truth.kl_seq}
        exact_tv = known | {"tv_max": truth.tv_max, "tv_seq": truth.tv_seq, "tv_by_position": truth.tv_by_position}
        for given in (known, exact_tv, exact_tv | {"tv_seq": None}, {"tv_max": truth.tv_max}):
            for name, bound in error_bounds(tree.depth, **given).bounds.items():
                assert truth.error <= bound.sharp + 1e-12, name
                assert bound.sharp <= bound.published
                closest = max(closest, truth.error / bound.sharp if bound.sharp else 0.0)
    # the trees come near enough for the claim to mean something: half of any sharp constant would be broken
    assert closest > 0.5


def test_no_function_of_d_seq_bounds_delta() -> None:
    # GIVEN one context, reached with probability p, where KL is 1, and equal policies elsewhere
    for reach in (1e-1, 1e-3, 1e-6):
        first = np.array([[1 - reach, reach]])
        at_rare = np.array([[0.5, 0.5]])
        tail = solve_kl_one()
        other = np.array([[0.3, 0.7]])
        tree = Tree(
            [first, np.vstack([other, at_rare])],
            [first, np.vstack([other, tail])],
            np.zeros(4),
            [np.ones(1, bool), np.ones(2, bool)],
        )
        truth = enumerate_tree(tree)
        # THEN D_seq goes to 0 with p while delta stays where it is
        assert truth.kl_max == pytest.approx(1.0, rel=1e-12)
        assert truth.kl_seq == pytest.approx(reach, rel=1e-9)


def solve_kl_one() -> np.ndarray:
    """q with KL((1/2, 1/2) || q) = 1: log(1 / (2 sqrt(q (1 - q)))) = 1."""
    product = math.exp(-2) / 4
    q = (1 - math.sqrt(1 - 4 * product)) / 2
    return np.array([[q, 1 - q]])
