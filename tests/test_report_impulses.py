"""Impulses are those of a plain loop over the tokens; the sentence tells them from drift as far as the figures do."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from report_rows import Row, score_batch, token_values

from trm_audit.numerics.histogram import RELATIVE_ERROR
from trm_audit.report.blocks import Impulses, ImpulseShare
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.impulses import DETECTORS, MAX_STALENESS, Detector, ImpulseTotals

SAMPLE_DATA = Path(__file__).parents[1] / "sample_data"
FIGURES = {"kl": (0.01, 10), "kl_estimate": (0.01, 10), "kl_lower": (0.01, 10), "k3": (0.01, 100)}


@cache
def measure() -> ModuleType:
    """The script that measures the sample data, which is no installed package."""
    spec = importlib.util.spec_from_file_location("measure_impulses", SAMPLE_DATA / "making" / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def impulses_of(own: Sequence[float], floor: float, factor: float) -> list[bool]:
    """The definition, token by token."""
    out = []
    for t, value in enumerate(own):
        neighbours = [*own[max(0, t - 3) : t], *own[t + 1 : t + 4]]
        enough = len(neighbours) >= 2
        out.append(enough and value > floor and value > factor * statistics.median(neighbours))
    return out


def spiky_rows(seed: int = 0, count: int = 60, names: Sequence[str] = ("kl",)) -> list[Row]:
    """Rows of 0 to 12 tokens, smooth but for spikes; holes in the mask, null lists, staleness 0, 10, 20 or null."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(rng.integers(0, 13))
        smooth = np.exp(rng.normal(-6, 1.5, length) + 2 * rng.normal())
        kl = smooth * np.where(rng.random(length) < 0.15, 1000, 1)
        row: Row = {
            "response_mask": [bool(b) for b in rng.random(length) < 0.85],
            "log_ratio": (np.sqrt(2 * kl) * rng.normal(size=length)).tolist(),
            "staleness": rng.choice(np.array([0, 10, 20, None], dtype=object)),
        }
        row |= {name: kl.tolist() if rng.random() < 0.9 else None for name in names}
        rows.append(row)
    return rows


def fed(rows: Sequence[Row], parts: int = 1, without: Sequence[str] = ()) -> ImpulseTotals:
    totals, record = ImpulseTotals(), score_batch(rows, without)
    cuts = np.linspace(0, len(rows), parts + 1).astype(int).tolist()
    for start, end in pairwise(cuts):
        totals.add(ScoreBatch(record.slice(start, end - start)), None)
    return totals


def finished(totals: ImpulseTotals) -> Impulses:
    found = totals.finish()
    assert found is not None
    return found


def assert_share(found: ImpulseShare, value: int | None, rows: Sequence[Row], name: str) -> None:
    """The figures of one line against loops over its rows."""
    lists = [values for row in rows if (values := token_values(row, name))]
    flags = [flag for values in lists for flag in impulses_of(values, *FIGURES[name])]
    values = [v for own in lists for v in own]
    inside = math.fsum(v for v, flag in zip(values, flags, strict=True) if flag)
    elsewhere = [v for v, flag in zip(values, flags, strict=True) if not flag]
    assert (found.value, found.num_tokens, found.num_impulses) == (value, len(values), sum(flags))
    assert found.share_of_sum == pytest.approx(inside / math.fsum(values), rel=1e-9)
    assert found.median == pytest.approx(np.median(values), rel=RELATIVE_ERROR)
    assert found.mean_elsewhere == pytest.approx(math.fsum(elsewhere) / len(elsewhere), rel=1e-9)


@pytest.mark.parametrize("parts", [1, 60])
@pytest.mark.parametrize("name", ["kl", "kl_lower", "k3"])
def test_impulses_are_those_of_a_loop_over_the_tokens(name: str, parts: int) -> None:
    rows = spiky_rows(names=() if name == "k3" else (name,))
    found = finished(fed(rows, parts))
    assert found.divergence == name
    assert found.all.num_impulses > 10
    assert_share(found.all, None, rows, name)
    assert [share.value for share in found.by_staleness] == [0, 10, 20]
    for share in found.by_staleness:
        assert_share(share, share.value, [row for row in rows if row["staleness"] == share.value], name)


def test_the_best_divergence_that_occurs_anywhere_is_used() -> None:
    # GIVEN some rows with kl, some with a lower bound of it, some with a sampled token only, and sketched ones
    names = [("kl",), ("kl_lower",), (), ("kl_lower", "kl_estimate")]
    grades = [spiky_rows(seed, 20, of) for seed, of in enumerate(names, 1)]
    totals = [fed(rows) for rows in grades]
    # THEN together they speak of kl, in any order, and without those rows of the next best
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        together = finished(totals[order[0]] + totals[order[1]] + totals[order[2]])
        assert together.divergence == "kl"
        assert_share(together.all, None, grades[0], "kl")
    assert_share(finished(totals[2] + totals[1]).all, None, grades[1], "kl_lower")
    assert_share(finished(totals[2] + totals[1] + totals[3]).all, None, grades[3], "kl_estimate")
    assert [detector.divergence for detector in DETECTORS] == list(FIGURES)


def test_two_halves_added_are_the_whole_whatever_the_batches() -> None:
    rows = spiky_rows()
    whole = finished(fed(rows))
    for totals in (fed(rows[:23], 5) + fed(rows[23:]), fed(rows[23:], 3) + fed(rows[:23]), fed(rows[::-1], 60)):
        found = finished(totals)
        assert found.sentence == whole.sentence
        for got, expected in zip([found.all, *found.by_staleness], [whole.all, *whole.by_staleness], strict=True):
            assert (got.value, got.num_tokens, got.num_impulses, got.median) == (
                expected.value,
                expected.num_tokens,
                expected.num_impulses,
                expected.median,
            )
            assert got.share_of_sum == pytest.approx(expected.share_of_sum, rel=1e-9)
            assert got.mean_elsewhere == pytest.approx(expected.mean_elsewhere, rel=1e-9)


def test_a_sum_does_not_share_memory_with_its_parts() -> None:
    rows = spiky_rows()
    part = fed(rows[:20])
    before = part.finish()
    together = part + ImpulseTotals()
    together.add(ScoreBatch(score_batch(rows)), None)
    assert part.finish() == before


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.001, 0.001, 0.5, 0.001, 0.001], [2]),
        ([0.001, 0.001, 0.0099, 0.001, 0.001], []),  # below the floor
        ([0.05, 0.05, 0.5, 0.05, 0.05], []),  # not above ten times its neighbours
        ([0.05, 0.05, 0.501, 0.05, 0.05], [2]),
        ([0.0, 0.02, 0.0], [1]),
        ([0.5, 0.001], []),  # one neighbour is not enough
        ([0.5, 0.001, 0.001], [0]),
        ([0.5], []),
        ([0.5, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0], [0, 5]),
        ([0.0, 0.1, 0.4, 0.0, 0.0, 0.0], [1, 2]),
        ([0.01, math.inf, 0.01, 0.2], [1, 3]),
        ([0.01, math.inf, math.inf, 0.2], [1, 2]),
        ([math.inf, math.inf, math.inf, math.inf], []),  # everywhere is not isolated
        ([math.inf, 0.0, math.inf, 0.0, 0.0], [0, 2]),
    ],
    ids=str,
)
def test_a_token_is_held_against_up_to_three_neighbours_on_each_side(values: list[float], expected: list[int]) -> None:
    found = Detector("kl", 0.01, 10.0).find(np.array(values), np.zeros(len(values), dtype=np.int64))
    assert np.flatnonzero(found).tolist() == expected
    if all(map(math.isfinite, values)):
        assert found.tolist() == impulses_of(values, 0.01, 10)


def test_the_next_sequence_and_tokens_of_a_tool_are_no_neighbours() -> None:
    # GIVEN a sequence that ends high beside one that starts low, and a tool's tokens between policy tokens
    rows: list[Row] = [
        {"kl": [0.5, 0.5, 0.5], "log_ratio": [0.0] * 3, "response_mask": [True] * 3},
        {"kl": [0.0, 0.0, 0.0], "log_ratio": [0.0] * 3, "response_mask": [True] * 3},
        {
            "kl": [0.0, 9.0, 9.0, 9.0, 0.3, 0.0],
            "log_ratio": [0.0] * 6,
            "response_mask": [True, *[False] * 3, True, True],
        },
    ]
    # THEN only the policy token after the tool stands out
    assert finished(fed(rows)).all.num_impulses == 1


def test_many_candidates_are_found_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values, rows = np.exp(rng.normal(-3, 3, 5000)), np.sort(rng.integers(0, 400, 5000))
    whole = DETECTORS[0].find(values, rows)
    monkeypatch.setattr("trm_audit.report.impulses._CHUNK", 7)
    assert (DETECTORS[0].find(values, rows) == whole).all()
    assert 0 < whole.sum() < 2500


@pytest.mark.parametrize("parts", [1, 3, 100])
def test_the_smallest_values_of_staleness_are_told_apart_in_any_order(parts: int) -> None:
    # GIVEN a hundred values of staleness in random order, each with its own number of tokens
    order = np.random.default_rng(parts).permutation(100).tolist()
    rows = [{"kl": [0.1] * (s % 5 + 1), "log_ratio": [0.0] * (s % 5 + 1), "staleness": s} for s in order]
    for totals in (fed(rows, parts), fed(rows[:50], parts // 2 + 1) + fed(rows[50:])):
        found = finished(totals)
        # THEN the first 32 have their own line, and the whole counts all
        assert [(s.value, s.num_tokens) for s in found.by_staleness] == [(s, s % 5 + 1) for s in range(MAX_STALENESS)]
        assert found.all.num_tokens == 300


def test_no_divergence_no_impulses() -> None:
    rows = spiky_rows()
    assert ImpulseTotals().finish() is None
    assert fed(rows, without=["kl", "log_ratio"]).finish() is None
    assert fed([{"log_ratio": [], "kl": None, "response_mask": []}]).finish() is None
    totals = ImpulseTotals()
    totals.add(ScoreBatch(score_batch(rows).slice(0, 0)), None)
    assert totals.finish() is None


def test_without_staleness_the_whole_is_all_there_is() -> None:
    rows = spiky_rows()
    found = finished(fed(rows, without=["staleness"]))
    assert found.by_staleness == []
    assert_share(found.all, None, rows, "kl")


def test_an_infinite_sum_has_no_share_and_the_sentence_says_so() -> None:
    own = [1e-4] * 60
    rows: list[Row] = [{"kl": [*own, math.inf, *own], "log_ratio": [0.0] * 121}]
    found = finished(fed(rows))
    assert (found.all.num_impulses, found.all.median) == (1, pytest.approx(1e-4, rel=RELATIVE_ERROR))
    assert math.isnan(found.all.share_of_sum)
    assert found.all.mean_elsewhere == pytest.approx(1e-4)
    assert found.sentence.startswith("1 of 121 tokens are impulses, of an infinite sum of kl; the median token is at")


def test_identical_policies_have_neither() -> None:
    found = finished(fed([{"kl": [0.0] * 200, "log_ratio": [0.0] * 200}]))
    assert (found.all.num_impulses, found.all.median, found.all.mean_elsewhere) == (0, 0, 0)
    assert math.isnan(found.all.share_of_sum)
    assert found.sentence == "None of 200 tokens is an impulse; the median token is at 0."


def long_rows(level: float, spikes: int, staleness: int | None, seed: int = 0) -> list[Row]:
    """Ten rows of 50 tokens around a level (its median), so many of which are at 0.2."""
    rng = np.random.default_rng(seed)
    kl = np.exp(rng.normal(0, 0.5, (10, 50)))
    kl *= level / np.median(kl)
    kl.flat[rng.choice(500, spikes, replace=False)] = 0.2
    return [{"kl": own.tolist(), "log_ratio": [0.0] * 50, "staleness": staleness} for own in kl]


def sentence(*rows: list[Row]) -> str:
    return finished(fed([row for some in rows for row in some])).sentence


def test_single_tokens_at_the_same_weights_point_to_routing_and_kernels() -> None:
    said = sentence(long_rows(1e-6, 9, 0))
    assert said.startswith("At staleness 0 impulses carry 99.97 % of the summed kl")
    assert "on 1.8 % of 500 tokens, and the median token is at 1.019e-6: single tokens, not a shift of all." in said
    assert said.endswith("The weights are the same there: look at routing (mixture of experts), kernels and precision.")


def test_single_tokens_of_unknown_or_old_weights_leave_the_cause_open() -> None:
    for staleness in (None, 30):
        said = sentence(long_rows(1e-6, 9, staleness))
        assert "single tokens, not a shift of all" in said
        assert "rollouts at staleness 0 tell the two apart" in said
        assert "drift of the weights at decisive tokens" in said


def test_a_median_near_the_mean_is_a_shift_of_all() -> None:
    said = sentence(long_rows(5e-3, 1, None))
    assert "nearly all are shifted a little. Look at what moves every token" in said
    assert said.endswith("old weights.")
    assert not sentence(long_rows(5e-3, 1, 0)).endswith("old weights.")
    assert "none of 500 tokens" in sentence(long_rows(5e-3, 0, 0))
    assert "shifted" not in sentence(long_rows(1e-6, 0, 0))


def test_a_median_that_rises_with_staleness_is_drift() -> None:
    said = sentence(long_rows(1e-6, 0, 0), long_rows(1e-4, 0, 10), long_rows(1e-3, 40, 20))
    assert said.startswith("At staleness 0 none of 500 tokens is an impulse")
    assert "The median rises with staleness, from 1e-6 at 0 to 0.001051 at 20: drift of the weights." in said
    assert said.endswith("Impulses rise with it, from 0 % to 8 % of the tokens.")


def test_a_median_that_stays_is_no_drift() -> None:
    said = sentence(long_rows(1e-4, 5, 0), long_rows(1e-4, 5, 20, seed=1))
    assert "The median does not rise with staleness" in said
    assert said.endswith("no drift of the weights is seen in it.")


def test_few_tokens_are_not_interpreted() -> None:
    said = sentence(long_rows(1e-6, 5, 0)[:1])
    assert said == "Too few tokens to tell impulses from a shift of all: 50 of 100."
    # and a staleness of few tokens is not compared
    assert "rises" not in sentence(long_rows(1e-6, 5, 0), long_rows(1e-2, 0, 20)[:1])


@pytest.mark.parametrize("folder", ["tiny", "tiny-moe"])
def test_sample_data_tell_impulses_from_drift(folder: str) -> None:
    # GIVEN the newest and an old version's KL, by the script that measured them and counts impulses its own way
    versions = sorted({row["policy_version"] for row in measure().rollout_rows(SAMPLE_DATA / folder / "rollouts")})
    newest, old = versions[-1], versions[-4]
    measured = [pair for version in (newest, old) for pair in measure().kl_per_token(SAMPLE_DATA / folder, version)]
    rows, counts = [], Counter()
    for row, kl in measured:
        staleness = newest - row["policy_version"]
        counts[staleness] += measure().impulses(kl)
        rows.append({"kl": kl.tolist(), "log_ratio": [0.0] * len(kl), "staleness": staleness})
        rows[-1]["response_mask"] = row["response_mask"]
    # WHEN they are looked for here
    found = finished(fed(rows))
    # THEN they are the same, and where the weights are the same only the mixture of experts has them
    assert {share.value: share.num_impulses for share in found.by_staleness} == counts
    said = "single tokens, not a shift of all" if folder == "tiny-moe" else "At staleness 0 none of"
    assert said in found.sentence
    # AND in both the median of all tokens rises with staleness
    assert "The median rises with staleness" in found.sentence


def test_definitions_are_stated_with_their_numbers() -> None:
    for detector in DETECTORS:
        floor, factor = FIGURES[detector.divergence]
        assert f"{detector.divergence} above {floor} and above {factor} times the median" in detector.definition
        assert (detector.floor, detector.factor) == (floor, factor)


def chance_of_an_impulse(detector: Detector, draws: Any) -> float:
    return float(detector.find(draws, np.zeros(len(draws), dtype=np.int64)).mean())


def test_the_factor_of_k3_leaves_few_impulses_to_the_draw_of_the_token() -> None:
    # GIVEN a uniform shift: k3 is kl times a chi-square variable of one degree of freedom, kl the same everywhere
    draws = np.random.default_rng(0).chisquare(1, 200_000)
    # THEN ten times the median of the neighbours happens often, a hundred times seldom
    assert chance_of_an_impulse(Detector("k3", 0.0, 10.0), draws) == pytest.approx(0.078, abs=0.004)
    assert chance_of_an_impulse(Detector("k3", 0.0, 100.0), draws) == pytest.approx(0.002, abs=0.0005)
