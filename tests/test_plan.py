"""What is computed together, what only once, and where it is found again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trm_audit.engine.plan import (
    MIN_SHARED,
    Node,
    Step,
    fork_steps,
    micro_batches,
    padded_steps,
    prefix_forest,
    tree_steps,
)
from trm_audit.numerics.ragged import Ints

lengths_of_rows = st.lists(st.integers(0, 300), max_size=60)
families = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 2), st.integers(0, 40), st.integers(0, 9)),
    max_size=24,
)
"""Sequences made of a prompt, a turn and an end: so many tokens of one of three prompts, ..."""


def rows_of(family: list[tuple[int, int, int, int, int]]) -> list[Ints]:
    text = np.random.default_rng(0).integers(0, 9, (2, 3, 40))
    return [
        np.concatenate([text[0, prompt, :long], text[1, turn, :more], np.arange(end)]).astype(np.int64)
        for prompt, long, turn, more, end in family
    ]


def plans(rows: list[Ints], budget: int, min_shared: int) -> dict[str, list[Step]]:
    lengths = [len(row) for row in rows]
    forest = prefix_forest(rows, min_shared=min_shared)
    return {
        "tree": tree_steps(forest, lengths, budget),
        "fork": fork_steps(forest, lengths, budget),
        "packed": tree_steps(prefix_forest(rows, shared=False), lengths, budget),
        "padded": padded_steps(lengths, budget),
        "constant": padded_steps(lengths, budget, constant=True),
    }


def tokens_by_span(steps: list[Step], rows: list[Ints]) -> list[list[int]]:
    """Which token each position of each sequence gets from the steps, -1 where none does."""
    found = [[-1] * len(row) for row in rows]
    for step in steps:
        flat = [-2] * max(sum(s.stop - s.start for s in step.segments), step.rows * step.width)
        at = 0
        for place, segment in enumerate(step.segments):
            at = place * step.width if step.width else at
            tokens = rows[segment.row][segment.start : segment.stop].tolist()
            flat[at : at + len(tokens)] = tokens
            at += len(tokens)
        for span in step.spans:
            assert found[span.row][span.start : span.start + span.count] == [-1] * span.count
            found[span.row][span.start : span.start + span.count] = flat[span.at : span.at + span.count]
    return found


@given(families, st.integers(1, 120), st.sampled_from([1, 4, MIN_SHARED]))
def test_every_position_of_every_sequence_is_computed_once_whatever_the_plan(
    family: list[tuple[int, int, int, int, int]], budget: int, min_shared: int
) -> None:
    rows = rows_of(family)
    for steps in plans(rows, budget, min_shared).values():
        assert tokens_by_span(steps, rows) == [row.tolist() for row in rows]


@given(families, st.integers(1, 120), st.sampled_from([1, MIN_SHARED]))
def test_no_step_is_larger_than_the_budget(
    family: list[tuple[int, int, int, int, int]], budget: int, min_shared: int
) -> None:
    rows = rows_of(family)
    for name, steps in plans(rows, budget, min_shared).items():
        for step in steps:
            size = step.rows * step.width if step.width else sum(s.stop - s.start for s in step.segments)
            assert size <= budget or (name == "constant" and step.rows == 1)


@given(families, st.integers(1, 120), st.sampled_from([1, MIN_SHARED]))
def test_when_a_segment_is_computed_the_path_before_it_holds_its_ancestors(
    family: list[tuple[int, int, int, int, int]], budget: int, min_shared: int
) -> None:
    # GIVEN one buffer, into which each segment that others build on writes its tokens at its positions
    rows = rows_of(family)
    for name in ("tree", "packed"):
        path: list[int] = [-1] * 200
        for step in plans(rows, budget, min_shared)[name]:
            for segment in step.segments:
                tokens = rows[segment.row].tolist()
                # THEN what stands before a segment's start is its own sequence, in depth-first order
                assert path[: segment.start] == tokens[: segment.start]
                if segment.shared or segment.start:
                    path[segment.start : segment.stop] = tokens[segment.start : segment.stop]


@given(families, st.integers(1, 120), st.sampled_from([1, MIN_SHARED]))
def test_a_step_continues_the_cache_of_its_own_prefix(
    family: list[tuple[int, int, int, int, int]], budget: int, min_shared: int
) -> None:
    rows = rows_of(family)
    for name in ("fork", "padded", "constant"):
        steps = plans(rows, budget, min_shared)[name]
        used = [0] * len(steps)
        cached: list[list[int]] = []
        for step in steps:
            before = cached[step.after] if step.after >= 0 else []
            used[step.after] += step.after >= 0
            for segment in step.segments:
                assert rows[segment.row][: segment.start].tolist() == before
            first = step.segments[0]
            cached.append(before + rows[first.row][first.start : first.stop].tolist())
            assert step.uses == 0 or len(step.segments) == 1  # a cache that is continued is one sequence's
        assert used == [step.uses for step in steps]


@given(families)
def test_a_forest_holds_each_common_prefix_once(family: list[tuple[int, int, int, int, int]]) -> None:
    rows = rows_of(family)
    forest = prefix_forest(rows, min_shared=1)
    prefixes = {tuple(row[: i + 1].tolist()) for row in rows for i in range(len(row))}
    assert sum(node.stop - node.start for node in forest) == len(prefixes)


def test_a_group_shares_its_prompt_and_nothing_shorter_than_is_worth_it() -> None:
    # GIVEN a prompt, and responses of which two begin with the same few tokens
    prompt = np.arange(100)
    rows = [np.concatenate([prompt, tail]) for tail in ([1, 2, 3], [1, 2, 9, 9], [7] * 30)]
    # THEN the prompt is one node, the responses are whole
    forest = prefix_forest(rows)
    assert [(node.start, node.stop, node.rows) for node in forest] == [
        (0, 100, [0, 1, 2]),
        (100, 103, [0]),
        (100, 104, [1]),
        (100, 130, [2]),
    ]
    assert [node.parent for node in forest] == [-1, 0, 0, 0]


def test_turns_of_an_agent_stored_as_rows_cost_the_last_one() -> None:
    whole = np.arange(500)
    rows = [whole[:n] for n in (120, 260, 380, 500)]
    assert prefix_forest(rows) == [Node(3, 0, 500, -1, [0, 1, 2, 3])]


def test_equal_sequences_are_computed_once() -> None:
    row = np.arange(40)
    assert prefix_forest([row, row.copy()]) == [Node(0, 0, 40, -1, [0, 1])]


def test_trees_and_branches_keep_the_order_of_the_rows() -> None:
    # GIVEN two interleaved groups, so that stored logits are read in order
    a, b = np.arange(50), np.arange(50)[::-1]
    rows = [np.concatenate([x, [t] * 20]) for x, t in ((a, 9), (b, 8), (a, 1), (b, 2))]
    assert [node.row for node in prefix_forest(rows) if node.start] == [0, 2, 1, 3]


def test_a_cut_leaves_no_crumbs() -> None:
    # GIVEN room for ten more tokens in a step of 1000
    rows = [np.arange(990), np.arange(5000, 5300)]
    steps = tree_steps(prefix_forest(rows), [990, 300], 1000)
    assert [[(s.row, s.start, s.stop) for s in step.segments] for step in steps] == [[(0, 0, 990)], [(1, 0, 300)]]


@pytest.mark.parametrize("others", [[], [1, 2, 3], [100] * 50, [97, 98, 112]])
def test_a_constant_shape_depends_on_the_sequence_alone(others: list[int]) -> None:
    steps = padded_steps([100, *others], 1000, constant=True)
    (mine,) = (step for step in steps if any(span.row == 0 for span in step.spans))
    assert (mine.rows, mine.width) == (8, 112)
    assert (112 - 100) / 100 <= 1 / 8


def test_a_model_that_cannot_continue_gets_long_sequences_whole() -> None:
    (step,) = padded_steps([500], 100, pieces=False)
    assert (step.rows, step.width, step.after) == (1, 500, -1)
    assert [step.after for step in padded_steps([250], 100)] == [-1, 0, 1]


@given(lengths_of_rows, st.integers(1, 1000))
def test_every_row_with_tokens_is_in_one_batch_and_no_other(lengths: list[int], budget: int) -> None:
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


def test_nothing_to_score_needs_no_forward() -> None:
    assert micro_batches([], 100) == micro_batches([0, 0], 100) == []
    empty = np.zeros(0, dtype=np.int64)
    assert all(steps == [] for steps in plans([empty, empty], 100, 1).values())
