"""Divergence by bin, token id, group and routing equals a plain loop over the tokens of the rows."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from report_rows import Row, random_rows, score_batch, token_values

from trm_audit.report.bins import (
    EDGES,
    LARGEST_ID,
    NUM_GROUPS,
    NUM_TOKEN_IDS,
    Axis,
    GroupTotals,
    RoutingTotals,
    TokenBinTotals,
    TokenIdTotals,
)
from trm_audit.report.blocks import BinDivergence
from trm_audit.report.breakdown import MAIN_DIVERGENCES
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.decode import token_text

SAMPLE_DATA = Path(__file__).parents[1] / "sample_data"
AXES: tuple[Axis, ...] = get_args(Axis)
TOKEN_AXES = AXES[:-1]
SOURCES = {"rollout_probability": ("rollout_logprobs",), "entropy": ("rollout_entropy", "trainer_entropy")}


def rows_with_everything(seed: int = 0, count: int = 20, num_ids: int = 40) -> list[Row]:
    """Rows of all grades, in any order, with every per-token column; some lists null."""
    rng = np.random.default_rng(seed)
    rows = [
        row for grade in ("exact", "sketch", "interval", "sampled") for row in random_rows(rng, count, grade, groups=30)
    ]
    for row in rows:
        length = len(row["response_mask"])
        row["response_ids"] = rng.integers(0, num_ids, length).tolist()
        row["rollout_logprobs"] = np.log(rng.random(length) ** 4).tolist()
        row["rollout_entropy"] = rng.exponential(1, length).tolist() if row["grade"] == "exact" else None
        row["trainer_entropy"] = rng.exponential(2, length).tolist()
        row["routing_agreement"] = rng.choice([1.0, 1.0, 0.75, 0.5], length).tolist()
        for name in ("rollout_logprobs", "trainer_entropy", "routing_agreement", "response_ids"):
            if rng.random() < 0.1:
                row[name] = None
    return [rows[i] for i in rng.permutation(len(rows))]


def tokens_of(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Every policy token: position, id, probability, entropy, agreement, and the main divergences that it has."""
    for row in rows:
        inside = [at for at, sampled in enumerate(row["response_mask"]) if sampled]
        values = {name: token_values(row, name) for name in MAIN_DIVERGENCES}
        for position, at in enumerate(inside):
            own = {name: None if row.get(name) is None else row[name][at] for name in ("rollout_entropy", *_PER_TOKEN)}
            logprob, entropy = own["rollout_logprobs"], own["rollout_entropy"]
            yield {
                "position": position,
                "id": own["response_ids"],
                "rollout_probability": None if logprob is None else math.exp(logprob),
                "entropy": own["trainer_entropy"] if entropy is None else entropy,
                "agreement": own["routing_agreement"],
                "divergences": {name: found[position] for name, found in values.items() if found is not None},
            }


_PER_TOKEN = ("trainer_entropy", "rollout_logprobs", "response_ids", "routing_agreement")


def figures(tokens: Sequence[dict[str, Any]], everyone: Sequence[dict[str, Any]]) -> dict[str, BinDivergence]:
    """Mean, largest and share of each divergence over some of the tokens."""
    out = {}
    for name in MAIN_DIVERGENCES:
        own = [token["divergences"][name] for token in tokens if name in token["divergences"]]
        total = math.fsum(token["divergences"].get(name, 0.0) for token in everyone)
        if own:
            out[name] = BinDivergence(math.fsum(own) / len(own), max(own), math.fsum(own) / total)
    return out


def assert_same(found: dict[str, BinDivergence], expected: dict[str, BinDivergence]) -> None:
    assert list(found) == list(expected)
    for name, figure in expected.items():
        got = found[name]
        assert got.max == pytest.approx(figure.max, rel=1e-12)  # numpy's expm1 is not math's to the last digit
        assert (got.mean, got.share) == pytest.approx((figure.mean, figure.share), rel=1e-9)


def fed(totals: Any, rows: Sequence[Row], parts: int = 1, without: Sequence[str] = ()) -> Any:
    """`totals` after the rows in so many batches."""
    record = score_batch(rows, without)
    for part in np.array_split(np.arange(len(rows)), parts):
        totals.add(ScoreBatch(record.slice(part[0], len(part))), None)
    return totals


def table(totals: TokenBinTotals) -> dict[str, Any]:
    return {axis: totals.finish(axis) for axis in AXES}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("axis", TOKEN_AXES)
def test_the_bins_of_tokens_are_those_of_a_loop(axis: Axis, seed: int) -> None:
    rows = rows_with_everything(seed)
    everyone = list(tokens_of(rows))
    bins: dict[int, list[dict[str, Any]]] = {}
    for token in everyone:
        if token[axis] is not None:
            bins.setdefault(bisect_right(EDGES[axis], token[axis]) - 1, []).append(token)
    found = fed(TokenBinTotals(), rows, 3).finish(axis)
    ends = [*EDGES[axis][1:], None]
    assert [(b.low, b.high, b.n) for b in found] == [
        (EDGES[axis][i], ends[i], len(bins[i])) for i in range(len(ends)) if i in bins
    ]
    for got, at in zip(found, sorted(bins), strict=True):
        assert_same(got.divergences, figures(bins[at], everyone))


def test_the_bins_of_lengths_count_sequences_and_average_over_their_tokens() -> None:
    rows = rows_with_everything()
    bins: dict[int, list[Row]] = {}
    for row in rows:
        length = sum(row["response_mask"])
        if length:
            bins.setdefault(length.bit_length(), []).append(row)
    found = fed(TokenBinTotals(), rows, 4).finish("length")
    assert [(b.low, b.high, b.n) for b in found] == [(2 ** (i - 1), 2**i, len(bins[i])) for i in sorted(bins)]
    for got, at in zip(found, sorted(bins), strict=True):
        assert_same(got.divergences, figures(list(tokens_of(bins[at])), list(tokens_of(rows))))


@pytest.mark.parametrize(
    ("axis", "column", "values", "lows"),
    [
        ("position", "kl", [0.1] * 9, [0, 1, 2, 2, 4, 4, 4, 4, 8]),
        (
            "rollout_probability",
            "rollout_logprobs",
            [0.0, math.log(0.5), -0.7, -800.0, -math.inf],
            [0.99, 0.5, 0.1, 0, 0],
        ),
        ("rollout_probability", "rollout_logprobs", [1e-9, math.log(0.1), math.log(1e-6)], [0.99, 0.1, 1e-6]),
        ("entropy", "rollout_entropy", [-1e-9, 0.0, 0.25, 1.0, 6.0, 12.0], [0, 0, 0.25, 1, 6, 6]),
    ],
    ids=["position", "probability", "probability edges", "entropy"],
)
def test_a_value_on_an_edge_belongs_to_the_bin_above(
    axis: Axis, column: str, values: list[float], lows: list[float]
) -> None:
    row: Row = {"log_ratio": [0.1] * len(values), column: values}
    found = fed(TokenBinTotals(), [row]).finish(axis)
    assert [b.low for b in found for _ in range(b.n)] == sorted(lows)


def test_the_trainers_entropy_stands_in_where_the_rollouts_is_unknown() -> None:
    # GIVEN an exact row and a sampled one, whose rollout entropy is null
    rows: list[Row] = [
        {"log_ratio": [0.1], "rollout_entropy": [0.3], "trainer_entropy": [5.0]},
        {"log_ratio": [0.1], "rollout_entropy": None, "trainer_entropy": [2.5]},
    ]
    # THEN the first lies at 0.25 to 0.5, the second at 2 to 3
    assert [b.low for b in fed(TokenBinTotals(), rows).finish("entropy")] == [0.25, 2.0]


@pytest.mark.parametrize("axis", TOKEN_AXES)
def test_shares_of_all_bins_are_one_where_every_token_has_the_quantity(axis: Axis) -> None:
    rows = [row for row in rows_with_everything() if all(row[name] is not None for name in _PER_TOKEN)]
    found = fed(TokenBinTotals(), rows).finish(axis)
    assert len(found) > 2
    for name in MAIN_DIVERGENCES:
        assert math.fsum(b.divergences[name].share for b in found if name in b.divergences) == pytest.approx(1)


@pytest.mark.parametrize("axis", AXES)
def test_an_infinite_divergence_is_infinite_in_its_bin_and_no_share_is_known(axis: Axis) -> None:
    # GIVEN two sequences, the longer of which ends in a token that the trainer excludes
    rows: list[Row] = [
        {"log_ratio": [-0.1], "kl": [0.2], "rollout_logprobs": [-0.01], "rollout_entropy": [0.001]},
        {"log_ratio": [-0.1, -9], "kl": [0.1, math.inf], "rollout_logprobs": [-0.01, -3], "rollout_entropy": [1e-3, 3]},
    ]
    found = {b.low: b.divergences["kl"] for b in fed(TokenBinTotals(), rows).finish(axis)}
    infinite = {"position": 1.0, "rollout_probability": 0.01, "entropy": 3.0, "length": 2.0}[axis]
    assert (found[infinite].mean, found[infinite].max) == (math.inf, math.inf)
    (other,) = (figure for low, figure in found.items() if low != infinite)
    assert (other.mean, other.max) == (pytest.approx(0.2 if axis == "length" else 0.15), 0.2)
    assert all(math.isnan(figure.share) for figure in found.values())


def test_identical_policies_have_no_shares_and_no_tokens_that_carry_them() -> None:
    rows: list[Row] = [{"log_ratio": [0.0, 0.0], "kl": [0.0, 0.0], "response_ids": [3, 4]}]
    found = fed(TokenBinTotals(), rows).finish("position")
    assert [(b.divergences["kl"].mean, b.divergences["kl"].max) for b in found] == [(0, 0), (0, 0)]
    assert all(math.isnan(b.divergences["kl"].share) for b in found)
    assert fed(TokenIdTotals(), rows).finish(None) == []


ALL: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "bins": (TokenBinTotals, table),
    "ids": (TokenIdTotals, lambda totals: totals.finish(None)),
    "groups": (
        GroupTotals,
        lambda totals: [(key, sums.tolist(), peaks.tolist()) for key, sums, peaks in totals.rows()],
    ),
    "routing": (RoutingTotals, lambda totals: totals.finish()),
}


def leaves(value: Any) -> list[Any]:
    """What stands in a tree of dataclasses, in order; numbers to rounding, for the order of sums."""
    if hasattr(value, "__dataclass_fields__"):
        return [leaf for name in value.__dataclass_fields__ for leaf in (name, *leaves(getattr(value, name)))]
    if isinstance(value, dict):
        return [leaf for key, entry in value.items() for leaf in (key, *leaves(entry))]
    if isinstance(value, list | tuple):
        return [leaf for entry in value for leaf in leaves(entry)]
    return [pytest.approx(value, rel=1e-9) if isinstance(value, float) else value]


def plain(value: Any) -> list[Any]:
    """As `leaves`, the numbers as they are."""
    return [getattr(leaf, "expected", leaf) for leaf in leaves(value)]


@pytest.mark.parametrize("what", list(ALL))
def test_two_halves_added_are_the_whole_whatever_the_batches(what: str) -> None:
    make, finish = ALL[what]
    rows = rows_with_everything(num_ids=3000)
    whole = leaves(finish(fed(make(), rows)))
    assert len(whole) > 10
    assert plain(finish(fed(make(), rows[:31], 2) + fed(make(), rows[31:], 7))) == whole
    assert plain(finish(fed(make(), rows[31:]) + fed(make(), rows[:31], 31))) == whole
    assert plain(finish(fed(make(), rows[::-1], len(rows)))) == whole


@pytest.mark.parametrize("what", list(ALL))
def test_a_sum_does_not_share_memory_with_its_parts(what: str) -> None:
    make, finish = ALL[what]
    rows = rows_with_everything()
    part = fed(make(), rows[:20])
    before = leaves(finish(part))
    fed(part + make(), rows)
    assert plain(finish(part)) == before


@pytest.mark.parametrize("what", list(ALL))
@pytest.mark.parametrize("rows", [[], [{"log_ratio": [], "response_mask": []}], [{"rollout_id": "r"}]], ids=len)
def test_nothing_gives_nothing(what: str, rows: list[Row]) -> None:
    make, finish = ALL[what]
    totals = make()
    if rows:
        names = [*rows[0], *("num_tokens", "rollout_id")]
        totals.add(ScoreBatch(score_batch([{"log_ratio": []} | row for row in rows]).select(names)), None)
    else:
        totals.add(ScoreBatch(score_batch(rows_with_everything()).slice(0, 0)), None)
    found = finish(totals)
    assert not (any(found.values()) if isinstance(found, dict) else found)


@pytest.mark.parametrize("axis", TOKEN_AXES)
@pytest.mark.parametrize("missing", ["rollout_logprobs", "entropy", "kl", "log_ratio", "response_ids", "seq_max_kl"])
def test_an_absent_column_takes_only_its_own_figures_away(axis: Axis, missing: str) -> None:
    rows = [row for row in rows_with_everything() if row["grade"] == "exact"]
    names = ["rollout_entropy", "trainer_entropy"] if missing == "entropy" else [missing]
    whole = fed(TokenBinTotals(), rows).finish(axis)
    found = fed(TokenBinTotals(), rows, without=names).finish(axis)
    if set(names) & set(SOURCES.get(axis, ())):
        assert found == []
        return
    lost = {"kl": {"kl"}, "log_ratio": {"k2", "k3", "abs_log_ratio"}}.get(missing, set())
    assert [(b.low, b.n) for b in found] == [(b.low, b.n) for b in whole]
    for got, full in zip(found, whole, strict=True):
        assert_same(got.divergences, {k: v for k, v in full.divergences.items() if k not in lost})


@pytest.mark.parametrize("grades", ["exact", "sketch", "interval", "sampled", "mixed"])
def test_the_token_ids_are_those_with_the_largest_sums_of_a_loop(grades: str) -> None:
    rows = [row for row in rows_with_everything() if grades in ("mixed", row["grade"])]
    everyone = list(tokens_of(rows))
    name = {"exact": "kl", "mixed": "kl", "sketch": "kl_estimate"}.get(grades, "k3")
    by_id: dict[int, list[dict[str, Any]]] = {}
    for token in everyone:
        if token["id"] is not None:
            by_id.setdefault(token["id"], []).append(token)
    sums = {number: math.fsum(t["divergences"].get(name, 0) for t in own) for number, own in by_id.items()}
    found = fed(TokenIdTotals(), rows, 5).finish(None)
    assert [row.id for row in found] == sorted(sums, key=lambda number: (-sums[number], number))[:NUM_TOKEN_IDS]
    for row in found:
        assert (row.n, row.text) == (len(by_id[row.id]), None)
        assert_same(row.divergences, figures(by_id[row.id], everyone))


def test_kl_upper_ranks_token_ids_where_there_is_nothing_else() -> None:
    row: Row = {"log_ratio": [0.0, 0.0], "kl_upper": [0.1, 0.3], "response_ids": [5, 2]}
    found = fed(TokenIdTotals(), [row], without=["log_ratio"]).finish(None)
    assert [(row.id, row.divergences["kl_upper"].share) for row in found] == [
        (2, pytest.approx(0.75)),
        (5, pytest.approx(0.25)),
    ]


def test_equal_sums_stand_in_the_order_of_their_ids() -> None:
    ids = [900, 7, 300_000, 41]
    row: Row = {"log_ratio": [0.1] * 4, "kl": [0.5, 0.5, 0.5, math.inf], "response_ids": ids}
    assert [row.id for row in fed(TokenIdTotals(), [row]).finish(None)] == [41, 7, 900, 300_000]


def test_absurd_ids_take_no_memory_and_are_not_listed_but_count_in_the_shares() -> None:
    row: Row = {"log_ratio": [0.1] * 4, "kl": [0.25] * 4, "response_ids": [-5, 2**31 - 1, LARGEST_ID, LARGEST_ID - 1]}
    totals = fed(TokenIdTotals(), [row])
    assert [(row.id, row.divergences["kl"].share) for row in totals.finish(None)] == [(LARGEST_ID - 1, 0.25)]
    assert len(totals.bins.n) <= 2 * LARGEST_ID


def test_token_ids_are_decoded_where_a_tokenizer_is_at_hand() -> None:
    tokenizer = token_text(SAMPLE_DATA / "tiny" / "model")
    assert tokenizer is not None
    row: Row = {"log_ratio": [0.1] * 3, "kl": [0.3, 0.2, 0.1], "response_ids": [5, 15, 70_000]}
    texts = [row.text for row in fed(TokenIdTotals(), [row]).finish(tokenizer)]
    assert texts == ["3", ";", "[70000]"]


@pytest.mark.parametrize("grades", ["exact", "sampled", "mixed"])
def test_the_groups_are_those_with_the_largest_means_of_a_loop(grades: str) -> None:
    rows = [row for row in rows_with_everything(count=60) if grades in ("mixed", row["grade"])]
    rows[0]["group_id"] = None
    name = "k3" if grades == "sampled" else "kl"
    means = {}
    for group in {row["group_id"] for row in rows} - {None}:
        own = [t["divergences"] for t in tokens_of([row for row in rows if row["group_id"] == group])]
        values = [divergences[name] for divergences in own if name in divergences]
        if values:
            means[group] = math.fsum(values) / len(values)
    found = fed(GroupTotals(), rows, 3).rows()
    assert [key for key, _, _ in found] == sorted(means, key=lambda group: (-means[group], group))[:NUM_GROUPS]
    assert len(means) > NUM_GROUPS
    at = 3 + 2 * MAIN_DIVERGENCES.index(name)
    for key, sums, _ in found:
        assert sums[at + 1] / sums[at] == pytest.approx(means[key], rel=1e-9)


def test_routing_tells_tokens_with_the_same_experts_from_others() -> None:
    rows = rows_with_everything()
    everyone = list(tokens_of(rows))
    known = [token for token in everyone if token["agreement"] is not None]
    same = [token for token in known if token["agreement"] == 1]
    differing = [token for token in known if token["agreement"] < 1]
    found = fed(RoutingTotals(), rows, 3).finish()
    assert (found.num_tokens, found.num_differing) == (len(known), len(differing))
    assert 0 < len(differing) < len(known) < len(everyone)
    assert found.mean_agreement == pytest.approx(
        math.fsum(token["agreement"] for token in known) / len(known), rel=1e-12
    )
    assert_same(found.same, figures(same, everyone))
    assert_same(found.differing, figures(differing, everyone))


def test_routing_is_not_spoken_of_where_no_token_has_it() -> None:
    rows = rows_with_everything()
    assert fed(RoutingTotals(), rows, without=["routing_agreement"]).finish() is None
    for row in rows:
        row["routing_agreement"] = None
    assert fed(RoutingTotals(), rows).finish() is None
