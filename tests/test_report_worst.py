"""The worst sequences are those of a sorted list of all rows, and their excerpts say what the shard says."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report_rows import Row, random_rows, score_batch, token_values

from trm_audit.report.blocks import WorstSequence
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.decode import token_text
from trm_audit.report.summary import Thresholds
from trm_audit.report.worst import MAX_PROMPT, MAX_RESPONSE, NUM_BY_MAX, NUM_BY_MEAN, WorstTotals

SAMPLE_DATA = Path(__file__).parents[1] / "sample_data"
BY_MAX = ("kl", "kl_estimate", "kl_lower", "k2")
BY_MEAN = ("kl", "kl_estimate", "kl_upper", "k3")


def rows_to_show(seed: int = 0, count: int = 25) -> list[Row]:
    """Rows of all grades in any order, with prompts, ids and log-probabilities; some columns null."""
    rng = np.random.default_rng(seed)
    rows = [row for grade in ("exact", "sketch", "interval", "sampled") for row in random_rows(rng, count, grade)]
    for row in rows:
        length = len(row["response_mask"])
        row |= {
            "prompt_ids": rng.integers(0, 99, rng.integers(1, 80)).tolist(),
            "response_ids": rng.integers(0, 99, length).tolist(),
            "rollout_logprobs": np.log(rng.random(length)).tolist(),
            "trainer_logprobs": np.log(rng.random(length)).tolist(),
            "staleness": rng.choice(np.array([0, 10, None], dtype=object)),
        }
        for name in ("engine", "reward", "group_id"):
            if rng.random() < 0.3:
                row[name] = None
    return [rows[i] for i in rng.permutation(len(rows))]


def fed(
    rows: Sequence[Row],
    parts: int = 1,
    without: Sequence[str] = (),
    thresholds: Thresholds | None = None,
    keep: Sequence[bool] | None = None,
) -> WorstTotals:
    totals, record = WorstTotals(thresholds or Thresholds()), score_batch(rows, without)
    for start, end in pairwise(np.linspace(0, len(rows), parts + 1).astype(int).tolist()):
        verdicts = None if keep is None else np.array(keep[start:end])
        totals.add(ScoreBatch(record.slice(start, end - start)), verdicts)
    return totals


def statistic(row: Row, kind: str, divergences: Sequence[str]) -> tuple[float, str] | None:
    """The row's value of the first divergence that it has."""
    for name in divergences:
        values = token_values(row, name)
        if values:
            return (max(values) if kind == "max" else math.fsum(values) / len(values)), name
    return None


def ranked(rows: Sequence[Row], kind: str, divergences: Sequence[str]) -> list[tuple[float, str, str]]:
    """Value, rollout_id and divergence of every row that has one, largest first, ties by id."""
    found = [(statistic(row, kind, divergences), row["rollout_id"]) for row in rows]
    return sorted(
        [(value[0], name, value[1]) for value, name in found if value], key=lambda entry: (-entry[0], entry[1])
    )


def expected(rows: Sequence[Row], by_max: Sequence[str] = BY_MAX) -> list[tuple[str, str]]:
    """rollout_id and statistic of what is to be shown: one row of each group, those without one as their own."""
    groups = {row["rollout_id"]: row["group_id"] or row["rollout_id"] for row in rows}
    seen: set[str] = set()

    def of_new_groups(entries: list[tuple[float, str, str]], size: int) -> list[tuple[float, str, str]]:
        out = []
        for entry in entries:
            if groups[entry[1]] not in seen and len(out) < size:
                seen.add(groups[entry[1]])
                out.append(entry)
        return out

    first = of_new_groups(ranked(rows, "max", by_max), NUM_BY_MAX)
    others = of_new_groups(ranked(rows, "mean", BY_MEAN), NUM_BY_MEAN)
    return [(i, f"seq_max_{d}") for _, i, d in first] + [(i, f"seq_mean_{d}") for _, i, d in others]


def names(found: Sequence[WorstSequence]) -> list[tuple[str, str]]:
    return [(sequence.rollout_id, sequence.statistic) for sequence in found]


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("grade", ["exact", "sketch", "interval", "sampled", "mixed"])
def test_the_largest_maxima_and_then_the_largest_means_are_shown(grade: str, seed: int) -> None:
    rows = [row for row in rows_to_show(seed) if grade in ("mixed", row["grade"])]
    found = fed(rows, 3).finish(None)
    assert names(found) == expected(rows)
    assert len(found) == NUM_BY_MAX + NUM_BY_MEAN
    values = {(kind, i): v for kind, ds in (("max", BY_MAX), ("mean", BY_MEAN)) for v, i, _ in ranked(rows, kind, ds)}
    for sequence in found:
        kind = sequence.statistic.split("_")[1]
        assert sequence.value == pytest.approx(values[kind, sequence.rollout_id], rel=1e-12)


@pytest.mark.parametrize(
    ("max_of", "compared"),
    [
        ("abs_log_ratio", ("abs_log_ratio",)),
        ("tv", ("tv", "tv_lower")),
        ("kl", ("kl", "kl_estimate", "kl_lower")),
        ("k3", ("k3",)),
    ],
)
def test_the_divergence_that_the_criteria_name_decides(max_of: str, compared: tuple[str, ...]) -> None:
    rows = rows_to_show()
    found = fed(rows, 2, thresholds=Thresholds(delta_max=0.05, max_of=max_of)).finish(None)
    assert names(found) == expected(rows, compared)


@pytest.mark.parametrize("parts", [1, 4, 75])
def test_what_is_shown_does_not_depend_on_order_and_batches(parts: int) -> None:
    rows = rows_to_show()
    whole = fed(rows).finish(None)
    assert fed(rows[::-1], parts).finish(None) == whole
    assert (fed(rows[:20], 3) + fed(rows[20:], 2)).finish(None) == whole
    assert (fed(rows[20:]) + fed(rows[:20])).finish(None) == whole
    # AND not on the process that read them
    moved = [pickle.loads(pickle.dumps(fed(part))) for part in (rows[:40], rows[40:])]
    assert (moved[1] + moved[0]).finish(None) == whole


def test_equal_values_stand_in_the_order_of_their_ids() -> None:
    # GIVEN many rows that are all equally far apart
    rows = [{"rollout_id": f"r{i:03}", "log_ratio": [0.5], "kl": [0.25]} for i in range(200)]
    mixed = [rows[i] for i in np.random.default_rng(0).permutation(200)]
    for parts in (1, 7, 200):
        assert names(fed(mixed, parts).finish(None)) == [
            *((f"r{i:03}", "seq_max_kl") for i in range(6)),
            *((f"r{i:03}", "seq_mean_kl") for i in range(6, 9)),
        ]


def test_a_row_says_where_it_can_be_found() -> None:
    rows = rows_to_show()
    by_id = {row["rollout_id"]: row for row in rows}
    keep = [i % 3 == 0 for i in range(len(rows))]
    for sequence in fed(rows, 5, keep=keep).finish(None):
        row = by_id[sequence.rollout_id]
        assert (sequence.group_id, sequence.engine, sequence.staleness, sequence.reward) == (
            row["group_id"],
            row["engine"],
            row["staleness"],
            row["reward"],
        )
        assert sequence.keep == keep[rows.index(row)]
        assert sequence.num_tokens == sum(row["response_mask"])
        assert (sequence.prompt_length, sequence.response_length) == (len(row["prompt_ids"]), len(row["response_ids"]))
        assert [token.id for token in sequence.prompt] == row["prompt_ids"][-MAX_PROMPT:]
        assert all(token.value is token.rollout_logprob is None for token in sequence.prompt)
    assert all(sequence.keep is None for sequence in fed(rows).finish(None))


def test_the_tokens_of_the_excerpt_are_the_rows_with_no_value_outside_the_mask() -> None:
    rows = rows_to_show(1)
    by_id = {row["rollout_id"]: row for row in rows}
    some_masked = False
    for sequence in fed(rows, 5).finish(None):
        row, name = by_id[sequence.rollout_id], sequence.divergence
        values = iter(token_values(row, name) or [])
        own = [next(values) if inside else None for inside in row["response_mask"]]
        some_masked |= None in own
        assert sequence.start == 0
        assert [token.id for token in sequence.response] == row["response_ids"]
        assert [token.value for token in sequence.response] == [
            value if value is None else pytest.approx(value, rel=1e-12) for value in own
        ]
        assert [token.rollout_logprob for token in sequence.response] == row["rollout_logprobs"]
        stored = zip(row["trainer_logprobs"], row["response_mask"], strict=True)
        assert [token.trainer_logprob for token in sequence.response] == [v if inside else None for v, inside in stored]
        assert own[sequence.position] == max(value for value in own if value is not None)
    assert some_masked


def long_row(length: int, peak: int, **given: Any) -> Row:
    kl = [1e-4] * length
    kl[peak] = 3.0
    return {"log_ratio": [0.1] * length, "kl": kl, "response_ids": list(range(length)), "prompt_ids": [1, 2]} | given


@pytest.mark.parametrize(
    ("length", "peak", "start"),
    [
        (120, 119, 0),
        (121, 0, 0),
        (121, 120, 1),
        (500, 60, 0),
        (500, 61, 1),
        (500, 250, 190),
        (500, 499, 380),
        (3, 1, 0),
    ],
)
def test_a_long_response_is_cut_around_its_maximum(length: int, peak: int, start: int) -> None:
    (found,) = fed([long_row(length, peak)]).finish(None)
    assert (found.position, found.start, found.response_length) == (peak, start, length)
    shown = range(start, min(length, start + MAX_RESPONSE))
    assert [token.id for token in found.response] == list(shown)
    assert found.response[peak - start].value == 3.0


def test_the_position_is_that_of_the_shard_or_the_first_of_the_largest() -> None:
    row = long_row(10, 4, response_mask=[False] * 2 + [True] * 8)
    row["kl"][1], row["kl"][7] = 9.0, 3.0  # a tool's token does not count, and equal ones come later
    stored = score_batch([row])
    assert fed([row]).finish(None)[0].position == 4
    totals = WorstTotals(Thresholds())
    with_column = stored.append_column("seq_argmax_kl", score_batch([{"log_ratio": [0.1], "at": 7}]).column("at"))
    totals.add(ScoreBatch(with_column), None)
    assert totals.finish(None)[0].position == 7


def test_values_that_a_shard_has_outside_the_mask_are_not_shown() -> None:
    columns = {"rollout_id": ["a"], "seq_max_kl": [3.0], "response_ids": [[7, 8, 9]]}
    columns |= {"kl": [[9.0, math.nan, 3.0]], "response_mask": [[False, True, True]]}
    totals = WorstTotals(Thresholds())
    totals.add(ScoreBatch(pa.RecordBatch.from_pydict(columns)), None)
    (found,) = totals.finish(None)
    assert found.position == 2
    assert [token.value for token in found.response] == [None, None, 3.0]


def test_infinite_values_come_first_and_nan_never() -> None:
    rows = [
        {"rollout_id": "a", "log_ratio": [-0.1], "kl": [5.0]},
        {"rollout_id": "b", "log_ratio": [-math.inf, -0.1], "kl": [math.inf, 0.1]},
        {"rollout_id": "c", "log_ratio": [], "kl": []},
        {"rollout_id": "d", "log_ratio": [-math.inf], "kl": [math.inf]},
    ]
    found = fed(rows).finish(None)
    assert [(s.rollout_id, s.value) for s in found] == [("b", math.inf), ("d", math.inf), ("a", 5.0)]
    assert [token.value for token in found[0].response] == []  # there are no ids to show
    assert (found[0].position, found[0].response_length) == (0, 2)


@pytest.mark.parametrize("missing", ["response_ids", "kl", "prompt_ids", "trainer_logprobs", "response_mask", "reward"])
def test_a_row_without_a_column_still_appears(missing: str) -> None:
    row = long_row(5, 2, trainer_logprobs=[-1.0] * 5, rollout_logprobs=[-0.5] * 5, reward=1.0)
    (found,) = fed([row], without=[missing]).finish(None)
    assert (found.statistic, found.value, found.num_tokens) == ("seq_max_kl", 3.0, 5)
    assert found.position == (None if missing == "kl" else 2)
    assert len(found.response) == (0 if missing == "response_ids" else 5)
    assert len(found.prompt) == found.prompt_length == (0 if missing == "prompt_ids" else 2)
    assert [t.trainer_logprob for t in found.response] == [None if missing == "trainer_logprobs" else -1.0] * len(
        found.response
    )
    assert [t.value for t in found.response][2:3] == (
        [] if missing == "response_ids" else [None if missing == "kl" else 3.0]
    )


def test_null_lists_are_as_good_as_no_column() -> None:
    nulls = dict.fromkeys(("response_ids", "prompt_ids", "rollout_logprobs", "trainer_logprobs"))
    first, second = fed([long_row(4, 1), long_row(4, 1, **nulls, rollout_id="r9")]).finish(None)
    assert (len(first.response), len(second.response)) == (4, 0)
    assert (second.position, second.response_length, second.prompt_length) == (1, 4, 0)


def test_without_ids_rows_are_shown_and_have_no_name() -> None:
    rows = [long_row(4, 1) for _ in range(20)]
    found = fed(rows, 3, without=["rollout_id"]).finish(None)
    assert [sequence.rollout_id for sequence in found] == [""] * 9


def test_nothing_gives_nothing() -> None:
    assert WorstTotals(Thresholds()).finish(None) == []
    assert fed([{"log_ratio": [], "kl": None}]).finish(None) == []
    totals = WorstTotals(Thresholds())
    totals.add(ScoreBatch(score_batch(rows_to_show()).slice(0, 0)), None)
    totals.add(ScoreBatch(score_batch(rows_to_show()).select(["rollout_id", "response_ids"])), None)
    assert totals.finish(None) == []


def test_tokens_are_decoded_where_a_tokenizer_is_at_hand() -> None:
    tokenizer = token_text(SAMPLE_DATA / "tiny" / "model")
    assert tokenizer is not None
    row = long_row(4, 1, response_ids=[5, 15, 70_000, -1], prompt_ids=[3, 12])
    (found,) = fed([row]).finish(tokenizer)
    assert [token.text for token in found.response] == ["3", ";", "[70000]", None]
    assert [token.text for token in found.prompt] == ["1", "+"]
    assert [token.text for token in fed([row]).finish(None)[0].response] == [None] * 4


def test_only_the_rows_that_may_be_shown_are_remembered() -> None:
    totals = fed(rows_to_show(count=200), 9)
    remembered = [candidate for largest in totals._largest for candidate in largest.found]
    assert len(remembered) == 2 * NUM_BY_MAX + NUM_BY_MEAN
    assert all(candidate.row.columns.num_rows == 1 for candidate in remembered)
    assert sum(candidate.row.columns.nbytes for candidate in remembered) < 50_000
