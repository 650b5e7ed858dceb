"""Rebuilding what a sampler did, against the warpers of transformers' own sampler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from trm_audit.numerics.sampling import sampling_logits


def warped(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Temperature, then top-k, then top-p, as transformers' generate applies them."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    out = TemperatureLogitsWarper(temperature)(ids, logits)
    if top_k > 0:
        out = TopKLogitsWarper(top_k)(ids, out)
    return TopPLogitsWarper(top_p)(ids, out) if top_p < 1 else out


def mass_above(logits: Tensor) -> Tensor:
    """Per token, the probability of all that are more probable."""
    p, order = logits.softmax(1).sort(dim=1, descending=True)
    return torch.zeros_like(p).scatter_(1, order, p.cumsum(1) - p)


def random_logits(vocab: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(40, vocab, generator=rng) * torch.linspace(0.1, 8, 40)[:, None]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [-1, 0, 1, 5, 60])
def test_logits_equal_those_of_transformers(temperature: float, top_p: float, top_k: int) -> None:
    """Both add up probabilities in float32, from opposite ends: a token at the very edge of the nucleus may differ."""
    for seed, vocab in enumerate([2, 60, 3000]):
        logits = random_logits(vocab, seed)
        found, wanted = sampling_logits(logits, temperature, top_p, top_k), warped(logits, temperature, top_p, top_k)
        differ = found.isfinite() != wanted.isfinite()
        edge = mass_above(warped(logits.double(), temperature, 1.0, top_k))[differ]
        assert bool(((edge - top_p).abs() < 1e-6).all())
        torch.testing.assert_close(found[~differ], wanted[~differ], rtol=1e-6, atol=0)


def test_settings_that_are_off_change_nothing() -> None:
    logits = random_logits(50, 1)
    for top_k in (-1, 0, 50, 1000):
        assert torch.equal(sampling_logits(logits, 1.0, 1.0, top_k), logits)


def test_at_least_one_token_is_kept_however_small_the_nucleus() -> None:
    kept = sampling_logits(random_logits(500, 2), 1.0, 1e-9, -1).isfinite()
    assert kept.sum(1).tolist() == [1] * 40
    assert torch.equal(kept.int().argmax(1), random_logits(500, 2).argmax(1))


def test_the_nucleus_is_the_smallest_set_that_reaches_its_mass() -> None:
    logits = random_logits(300, 3)
    kept, p = sampling_logits(logits, 1.0, 0.8, -1).isfinite(), logits.double().softmax(1)
    inside = (p * kept).sum(1)
    least = torch.where(kept, p, 2.0).amin(1)
    assert bool((inside >= 0.8 - 1e-6).all())
    assert bool((inside - least < 0.8 + 1e-6).all())


def test_top_k_keeps_what_ties_with_the_last_place() -> None:
    found = sampling_logits(torch.tensor([[3.0, 2.0, 2.0, 1.0]]), 1.0, 1.0, 2)
    assert found.isfinite().tolist() == [[True, True, True, False]]


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    # GIVEN .4 .3 .2 .1, of which top-k leaves .4 and .3, that is .57 and .43
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # THEN half of the mass is reached by the first token alone
    assert sampling_logits(logits, 1.0, 0.5, 2).isfinite().tolist() == [[True, False, False, False]]
    assert sampling_logits(logits, 1.0, 0.5, -1).isfinite().tolist() == [[True, True, False, False]]


def test_the_input_is_left_as_it_was() -> None:
    logits = random_logits(30, 4)
    copy = logits.clone()
    sampling_logits(logits, 0.5, 0.5, 3)
    assert torch.equal(logits, copy)


def test_half_precision_logits_are_tempered_in_float32() -> None:
    stored = random_logits(60, 5).half()
    torch.testing.assert_close(sampling_logits(stored, 0.7, 0.9, -1), warped(stored.float(), 0.7, 0.9, -1))
