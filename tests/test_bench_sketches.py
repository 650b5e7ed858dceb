"""The proof of sketches counts what it says, on pairs that are made here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import sketch_coverage
from bench.sketch_accuracy import GRID, measure, summary
from bench.sketch_coverage import counted, rows
from bench.sketch_material import Response, disturb
from bench.sketch_page import render
from trm_audit.numerics.divergences import divergences
from trm_audit.numerics.sketch import sketch


def responses(count: int, length: int, vocab: int = 500) -> list[Response]:
    """Pairs of policies a little apart, with their exact figures from float64."""
    rng, out = torch.Generator().manual_seed(0), []
    for number in range(count):
        rollout = 2 * torch.randn(length, vocab, generator=rng)
        trainer = rollout + 0.1 * torch.randn(length, vocab, generator=rng)
        exact = divergences(rollout.double(), trainer.double())
        p, q = (x.double().softmax(1).sqrt() for x in (rollout, trainer))
        ids = np.zeros(length, dtype=np.int64)
        apart = (p - q).square().sum(1)
        out.append(Response(f"r{number}", ids, rollout, trainer, exact.kl.numpy(), exact.tv.numpy(), apart.numpy()))
    return out


def test_misses_are_counted_by_place_and_their_error_by_seed() -> None:
    # GIVEN four seeds and three places; one seed misses everywhere, another one at the last place
    wrong = np.array([[1, 1, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0]], dtype=bool)
    found = counted(wrong)
    assert found["share"] == pytest.approx(4 / 12)
    assert found["error"] == pytest.approx(np.std([1, 0, 1 / 3, 0], ddof=1) / 2)
    assert (found["most"], found["of"]) == (2, 3)


def test_a_vector_of_another_seed_is_what_a_whole_sketch_would_have_had() -> None:
    at = rows(responses(2, 8))
    wanted = sketch(at.rollout, sketch_coverage.K, 128, 7)
    found = at.sketched(128, 7)
    torch.testing.assert_close(found.vector, wanted.vector, rtol=1e-3, atol=1e-6)
    assert torch.equal(found.topk_ids, wanted.topk_ids)
    assert torch.equal(found.tail_mass, wanted.tail_mass)


def test_errors_biases_misses_and_accuracy_of_ordinary_pairs_and_their_page() -> None:
    data = responses(4, 8)
    coverage, accuracy = sketch_coverage.measure(rows(data), 80), measure("made", data)
    # THEN the error falls as the root of m, without bias, and what misses stays within what is allowed
    tails = coverage["errors"]["tails"]
    assert abs(tails["exponent"] + 0.5) < 0.06
    assert tails["error"][64] == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert all(abs(one["z"]) < 4.5 and one["largest_z"] < 5.5 for one in coverage["bias"].values())
    for one in coverage["coverage"]:
        assert all(found["most"] <= found["allowed"] for name, found in one.items() if name not in ("m", "seeds"))
        assert 0.015 < one["distance, one"]["share"] < 0.075
    # and no bound is violated, lists in float16 are smaller, and the page shows every line
    for line in accuracy["grid"]:
        assert line["violated"] == 0
        assert line["bytes"]["rollout_topk_logprobs"] < line["bytes"]["rollout_topk_logprobs as float32"]
        assert line["tv_upper_single"] <= line["tv_upper"]
    both = {"confidence": 0.95, "sets": [accuracy], "machine": coverage["machine"]}, coverage
    page = render(*json.loads(json.dumps(both)))
    assert all(f"| {k}, {m} |" in page for k, m in GRID)
    assert f"{coverage['coverage'][0]['distance, one']['share']:.4f}" in page


def test_verdicts_that_differ_and_undecided_ones_are_counted() -> None:
    one = {"kl": 0.04, "tv": 0.1, "estimate": 0.06, "distance_missed": 0.0, "violated": 0.0, "tokens": 5.0}
    one |= {"kl_lower": 0.03, "kl_upper": 0.2, "tv_lower": 0.09, "tv_upper": 0.11}
    one |= {f"{name}_single": one[name] for name in ("kl_lower", "kl_upper", "tv_lower", "tv_upper")}
    found = summary([one, one | {"estimate": 0.04, "tv_upper": 0.1}])
    assert found["differ"] == [0, 1, 0]
    assert found["kl_undecided"] == [0.0, 1.0, 1.0]
    assert found["tv_undecided"] == [0.0, 0.5, 0.0]
    assert found["estimate"] == pytest.approx([1.0, 1.5])


def test_noise_is_in_relation_to_each_matrix_and_spares_the_rest() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.LayerNorm(300))
    with torch.no_grad():
        model[0].weight.mul_(7)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    disturb(model, 0.02)
    moved = {name: float((value.detach() - before[name]).std()) for name, value in model.named_parameters()}
    assert moved["0.weight"] == pytest.approx(0.02 * float(before["0.weight"].std()), rel=0.02)
    assert moved["0.bias"] == moved["1.weight"] == 0
