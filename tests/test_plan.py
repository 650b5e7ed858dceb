"""Which rows are scored together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trm_audit.engine.plan import micro_batches

lengths_of_rows = st.lists(st.integers(0, 300), max_size=60)


@given(lengths_of_rows, st.integers(1, 1000))
def test_every_row_with_tokens_is_scored_once_and_no_other(lengths: list[int], budget: int) -> None:
    rows = [row for group in micro_batches(lengths, budget) for row in group]
    assert sorted(rows) == [row for row, length in enumerate(lengths) if length]


@given(lengths_of_rows, st.integers(1, 1000))
def test_the_padded_size_stays_under_the_budget_unless_one_row_alone_exceeds_it(
    lengths: list[int], budget: int
) -> None:
    for group in micro_batches(lengths, budget):
        assert len(group) * max(lengths[row] for row in group) <= budget or len(group) == 1


@given(lengths_of_rows, st.integers(1, 1000))
def test_a_group_is_as_large_as_the_budget_allows(lengths: list[int], budget: int) -> None:
    groups = micro_batches(lengths, budget)
    for group in groups[:-1]:
        assert (len(group) + 1) * lengths[group[0]] > budget


@given(lengths_of_rows, st.integers(1, 1000))
def test_the_plan_depends_on_nothing_but_lengths_and_their_order(lengths: list[int], budget: int) -> None:
    groups = micro_batches(lengths, budget)
    assert groups == micro_batches(list(lengths), budget)
    flat = [row for group in groups for row in group]
    assert flat == sorted(flat, key=lambda row: (-lengths[row], row))


def test_rows_of_similar_length_go_together() -> None:
    assert micro_batches([10, 100, 12, 90, 11], max_tokens=200) == [[1, 3], [2, 4, 0]]


def test_equal_lengths_stay_in_row_order() -> None:
    assert micro_batches([5, 5, 5, 5, 5], max_tokens=10) == [[0, 1], [2, 3], [4]]


def test_rows_go_alone_where_positions_depend_on_the_batch() -> None:
    assert micro_batches([5, 0, 9, 5], max_tokens=1000, alone=True) == [[2], [0], [3]]


def test_nothing_to_score_needs_no_forward() -> None:
    assert micro_batches([], 100) == micro_batches([0, 0], 100) == []
