"""Reductions over sequences of different lengths against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trm_audit.numerics.ragged import Ragged, segment_sum, sequence_statistics

numbers = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.inf, -0.0, 0.0, 1.0, 1.0]))
sequences = st.lists(st.lists(st.tuples(numbers, st.booleans()), max_size=6), max_size=8)


def flat(rows: list[list[tuple[float, bool]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """values, offsets, mask."""
    entries = [entry for row in rows for entry in row]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return np.array([value for value, _ in entries]), offsets, np.array([there for _, there in entries], dtype=np.bool_)


@given(sequences)
def test_statistics_equal_a_plain_loop(rows: list[list[tuple[float, bool]]]) -> None:
    found = sequence_statistics(*flat(rows))
    for i, row in enumerate(rows):
        kept = [(value, at) for at, (value, there) in enumerate(row) if there]
        if not kept:
            assert found.argmax[i] == -1
            assert all(math.isnan(values[i]) for values in (found.max, found.mean, found.sum))
            continue
        peak = max(value for value, _ in kept)
        assert found.max[i] == peak
        assert found.argmax[i] == min(at for value, at in kept if value == peak)
        assert found.sum[i] == pytest.approx(sum(value for value, _ in kept), rel=1e-12, abs=1e-9)
        assert found.mean[i] == pytest.approx(sum(value for value, _ in kept) / len(kept), rel=1e-12, abs=1e-9)


def test_the_first_of_equal_maxima_is_where_the_maximum_stands() -> None:
    values, offsets = np.array([1.0, 7.0, 7.0, 7.0, 2.0, 7.0]), np.array([0, 4, 6])
    found = sequence_statistics(values, offsets, np.array([True, False, True, True, True, True]))
    assert found.argmax.tolist() == [2, 1]


def test_entries_outside_the_mask_are_not_looked_at() -> None:
    # GIVEN placeholders of every kind where the policy did not sample
    values, offsets = np.array([np.nan, 3.0, np.inf, -9999.0, 1.0]), np.array([0, 5])
    found = sequence_statistics(values, offsets, np.array([False, True, False, False, True]))
    assert (found.max[0], found.mean[0], found.sum[0], found.argmax[0]) == (3.0, 2.0, 4.0, 1)


def test_infinity_stays_in_its_own_sequence() -> None:
    values, offsets = np.array([1.0, np.inf, np.inf, -np.inf, 2.0, 3.0]), np.array([0, 2, 4, 4, 6])
    assert segment_sum(values, offsets)[[0, 2, 3]].tolist() == [math.inf, 0.0, 5.0]
    found = sequence_statistics(values, offsets, np.ones(6, dtype=np.bool_))
    assert found.max[[0, 1, 3]].tolist() == [math.inf, math.inf, 3.0]
    assert found.mean[3] == 2.5
    assert math.isnan(found.sum[1])  # inf - inf


def test_minus_infinity_alone_is_a_maximum() -> None:
    found = sequence_statistics(np.array([-np.inf, -np.inf]), np.array([0, 2]), np.ones(2, dtype=np.bool_))
    assert (found.max[0], found.argmax[0]) == (-math.inf, 0)


def test_no_sequences_and_empty_sequences_are_fine() -> None:
    nothing = np.zeros(0)
    assert len(sequence_statistics(nothing, np.array([0]), nothing.astype(np.bool_)).max) == 0
    assert sequence_statistics(nothing, np.array([0, 0, 0]), nothing.astype(np.bool_)).argmax.tolist() == [-1, -1]


def test_sums_are_float64_whatever_is_summed() -> None:
    values = np.full(100_000, 0.1, dtype=np.float32)
    found = sequence_statistics(values, np.array([0, 100_000]), np.ones(100_000, dtype=np.bool_))
    assert found.sum[0] == pytest.approx(float(np.float32(0.1)) * 100_000, rel=1e-12)


def test_ragged_gives_back_its_rows() -> None:
    ragged = Ragged(np.array([5, 6, 7]), np.array([0, 2, 2, 3]))
    assert [ragged[row].tolist() for row in range(len(ragged))] == [[5, 6], [], [7]]
    assert ragged.lengths.tolist() == [2, 0, 1]
