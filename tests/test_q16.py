"""q16 loses at most (span / 65535)^2 / 12 of KL in every row, keeps -inf, is read as float32 and refused if damaged."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from some_rollouts import VOCAB, as_table, log_softmax, rollout

from trm_audit.errors import BadInput, RowError
from trm_audit.pipeline.score import ScoreOptions, score
from trm_audit.shards import q16
from trm_audit.shards.logits import StoredLogits
from trm_audit.shards.read_ahead import logits_ahead
from trm_audit.shards.rollout_writer import LOGITS_SCHEMA, LogitsTableWriter, write_rollout_table

INF = float("inf")
Rows = np.ndarray


def normal(positions: int, vocab_size: int = VOCAB, scale: float = 3.0, seed: int = 0) -> Rows:
    return np.random.default_rng([seed, vocab_size]).normal(scale=scale, size=(positions, vocab_size)).astype("f4")


def by_the_schema(data: bytes, vocab_size: int) -> Rows:
    """Log-probabilities of stored rows in float64, byte by byte as schemas/rollout.md says."""
    rows = []
    for at in range(0, len(data), 12 + 2 * vocab_size):
        scale, minimum, logsumexp = struct.unpack_from("<fff", data, at)
        codes = struct.unpack_from(f"<{vocab_size}H", data, at + 12)
        rows.append([-INF if code == 65535 else minimum + code * scale - logsumexp for code in codes])
    return np.array(rows)


def encoded(logits: Rows) -> bytes:
    return q16.encode(logits, "here").tobytes()


def decoded(rows: np.ndarray, vocab_size: int) -> Rows:
    out = np.empty((len(rows), vocab_size), np.float32)
    q16.decode(rows, out, "here", 0)
    return out


def kl(p: Rows, stored: Rows) -> Rows:
    """[n] KL(p || stored) of log-probabilities; infinite where p has what `stored` has not. Accurate for near ones.

    The error e of each value is what is summed up: p (exp(e) - 1 - e) is never negative and nothing cancels.
    """
    with np.errstate(invalid="ignore"):
        e = np.where(np.isneginf(p), 0.0, stored - p)
    mean = (np.exp(p) * e).sum(1, keepdims=True)
    e = e - mean
    mass = np.exp(p)
    return np.log1p((mass * (np.expm1(e) - e)).sum(1) + (mass * e).sum(1)) - (mass * e).sum(1)


def spans(logp: Rows) -> Rows:
    return logp.max(1) - np.where(np.isneginf(logp), INF, logp).min(1)


def with_holes(rows: Rows, share: float) -> Rows:
    """Some values -inf; one of each row stays."""
    holes = np.random.default_rng(7).random(rows.shape) < share
    holes[:, rows.shape[1] // 2] = False
    return np.where(holes, np.float32(-INF), rows)


SHAPES: dict[str, Callable[[int], Rows]] = {
    "normal": lambda v: normal(6, v),
    "wide": lambda v: np.concatenate([normal(6, v, 90.0).clip(-499, 499)]),
    "peaked": lambda v: normal(6, v) + 30 * np.eye(6, v, dtype="f4"),
    "flat": lambda v: normal(6, v, 0.01),
    "even": lambda v: np.tile(np.linspace(-20, 0, v, dtype="f4"), (2, 1)),
    "one below": lambda v: np.where(np.arange(v) == 0, np.float32(-50), np.float32(0))[None, :].repeat(2, 0),
    "two heights": lambda v: np.where(np.arange(v) % 2, np.float32(-1 / 3), np.float32(0))[None, :],
    "holes": lambda v: with_holes(normal(6, v), 0.5),
    "nearly all holes": lambda v: with_holes(normal(6, v), 0.99),
}


@pytest.mark.parametrize("vocab_size", [2, 3, 7, 100, 1001, 50_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_loses_at_most_a_twelfth_of_its_squared_step(shape: str, vocab_size: int) -> None:
    rows = SHAPES[shape](vocab_size)
    truth = log_softmax(rows)
    bound = (spans(truth) / 65535) ** 2 / 12
    data = encoded(rows)
    # as it is stored, but for the float32 of its logsumexp, which is the same for every value of a row
    stored = by_the_schema(data, vocab_size)
    normalised = stored - np.log(np.exp(stored).sum(1, keepdims=True))
    lost = kl(truth, normalised)
    assert (lost >= -1e-16).all()
    assert (lost <= bound + 1e-15).all(), (lost / bound).max()
    # as it is read: float32 rounds once more, by 2**-24 of a value's size
    read = decoded(np.frombuffer(data, np.uint8).reshape(len(rows), -1), vocab_size).astype(np.float64)
    np.testing.assert_array_equal(np.isneginf(read), np.isneginf(truth))
    size = np.where(np.isneginf(truth), 0, np.abs(truth)).max(1) + 1
    assert (np.abs(np.log(np.exp(read).sum(1))) <= 2.0**-22 * size).all()
    assert (kl(truth, log_softmax(read)) <= (np.sqrt(bound) + 2.0**-22 * size) ** 2).all()


def between_two_codes(vocab_size: int, span: float = 40.0) -> Rows:
    """Half of the mass a hair less than half a step below the largest value, half a hair more: the worst of rows."""
    step = span / 65533
    row = np.where(np.arange(vocab_size) % 2, -0.49 * step, -0.51 * step)
    row[0], row[1] = 0, -span
    return row[None, :].astype("f4")


@pytest.mark.parametrize("vocab_size", [1000, 50_000])
def test_a_row_that_an_unlucky_grid_would_break_is_put_on_another(vocab_size: int) -> None:
    # GIVEN a row on which the grid from its least value is off by half a step everywhere, up and down
    rows = between_two_codes(vocab_size)
    truth = log_softmax(rows)
    low, span = truth.min(), spans(truth)[0]
    naive = low + np.rint((truth - low) / (span / 65533)) * (span / 65533)
    bound = (span / 65535) ** 2 / 12
    assert kl(truth, log_softmax(naive))[0] > 1.4 * bound
    # THEN the grid shifted by half a step is used, where nearly nothing is lost
    assert kl(truth, log_softmax(by_the_schema(encoded(rows), vocab_size)))[0] < 0.1 * bound


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 12)),
        elements=st.one_of(st.just(-INF), st.floats(-400, 400, width=32), st.floats(-(2.0**-10), 2.0**-10, width=32)),
    )
)
def test_any_row_with_a_finite_value_comes_back_within_half_a_step(rows: Rows) -> None:
    rows[:, 0] = np.where(np.isneginf(rows).all(1), 0, rows[:, 0])
    truth = log_softmax(rows)
    stored = by_the_schema(encoded(rows), rows.shape[1])
    stored -= np.log(np.exp(stored).sum(1, keepdims=True))
    step = spans(truth) / 65533
    np.testing.assert_array_equal(np.isneginf(stored), np.isneginf(truth))
    with np.errstate(invalid="ignore"):
        error = np.where(np.isneginf(truth), 0, np.abs(stored - truth)).max(1)
    assert (error <= step * 1.001 + 1e-12).all()  # half a step of the value, half a step of the normaliser
    assert (kl(truth, stored) <= (spans(truth) / 65535) ** 2 / 12 + 1e-15).all()


def test_the_normaliser_of_what_was_rounded_is_stored() -> None:
    rows = with_holes(normal(50, 400), 0.2)
    numbers = q16.encode(rows, "here")[:, :12].copy().view("<f4").astype(np.float64)
    codes = q16.encode(rows, "here")[:, 12:].copy().view("<u2")
    for (scale, minimum, logsumexp), row in zip(numbers, codes, strict=True):
        total = math.fsum(math.exp(minimum + int(code) * scale) for code in row if code != 65535)
        assert logsumexp == pytest.approx(math.log(total), rel=1e-6, abs=1e-10)
        assert logsumexp != 0


def test_minus_infinity_has_a_code_of_its_own() -> None:
    rows = normal(5, 9)
    rows[2, [0, 4]] = -INF
    codes = q16.encode(rows, "here")[:, 12:].copy().view("<u2")
    np.testing.assert_array_equal(codes == 65535, np.isneginf(rows))
    assert codes[~np.isneginf(rows)].max() in (65533, 65534)


@pytest.mark.parametrize("vocab_size", [1, 2, 5])
def test_one_finite_value_has_all_the_probability_and_equal_ones_share_it(vocab_size: int) -> None:
    alone = np.full((1, vocab_size), -INF, np.float32)
    alone[0, -1] = -77.25
    equal = np.full((1, vocab_size), 123.5, np.float32)
    tiny = np.arange(vocab_size, dtype=np.float32)[None, :] * np.float32(1e-42)
    for rows in (alone, equal, tiny):
        found = decoded(q16.encode(rows, "here"), vocab_size)
        np.testing.assert_allclose(found, log_softmax(rows), rtol=2e-7, atol=1e-7)


def test_a_constant_for_each_row_makes_no_difference() -> None:
    rows = np.round(normal(20) * 256) / 256  # adding to these is exact
    constants = np.array([0.0, 1, -300, 512, 0.25] * 4, np.float32)[:, None]
    assert encoded(rows + constants) == encoded(rows)


def test_rows_are_encoded_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = with_holes(normal(9, 40), 0.3)
    whole = q16.encode(rows, "here")
    monkeypatch.setattr(q16, "VALUES_AT_ONCE", 80)
    np.testing.assert_array_equal(q16.encode(rows, "here"), whole)
    np.testing.assert_array_equal(np.concatenate([q16.encode(row[None, :], "here") for row in rows]), whole)
    two_at_once = decoded(whole, 40)
    monkeypatch.setattr(q16, "VALUES_AT_ONCE", 1 << 20)
    np.testing.assert_array_equal(decoded(whole, 40), two_at_once)


# In a file


def table_of(file: Path, row_group_bytes: int = 1 << 20, **logits: Rows) -> Path:
    with LogitsTableWriter(file, "q16", row_group_bytes=row_group_bytes) as writer:
        for name, each in logits.items():
            writer.add(name, each)
    return file


def test_the_long_table_has_its_columns_and_blocks_of_64_rows(tmp_path: Path) -> None:
    rows = normal(130, 7)
    table = pq.read_table(table_of(tmp_path / "l.parquet", a=rows))
    assert table.schema.names == LOGITS_SCHEMA.names
    assert set(table["encoding"].to_pylist()) == {"q16"}
    assert table["count"].to_pylist() == [64, 64, 2]
    assert table["vocab_size"].to_pylist() == [7, 7, 7]
    assert b"".join(table["data"].to_pylist()) == encoded(rows)
    assert len(table["data"][2].as_py()) == 2 * (12 + 2 * 7)


def test_halves_and_bit_patterns_of_bfloat16_are_stored_as_their_values(tmp_path: Path) -> None:
    x = torch.from_numpy(normal(3))
    half, brain = x.half(), x.bfloat16()
    for given_as, meant in ((half.numpy(), half), (brain.view(torch.uint16).numpy(), brain)):
        table = pq.read_table(table_of(tmp_path / "l.parquet", a=given_as))
        assert table["data"][0].as_py() == encoded(meant.float().numpy())


@pytest.mark.parametrize("row_group_bytes", [1, 1 << 20])
def test_any_range_is_read_as_float32_across_blocks_and_ahead(tmp_path: Path, row_group_bytes: int) -> None:
    a, b = with_holes(normal(150), 0.1), normal(3, seed=1)
    stored = StoredLogits([table_of(tmp_path / "l.parquet", row_group_bytes, a=a, b=b)], cache_bytes=20_000)
    expected = torch.from_numpy(by_the_schema(encoded(a), VOCAB)).float()
    requests = [("a", runs) for runs in ([(0, 150)], [(63, 65)], [(3, 10), (60, 70), (149, 150)], [(64, 128)])]
    with logits_ahead(stored, requests, max_bytes=10_000, threads=2) as ahead:
        for (name, runs), rows in zip(requests, ahead, strict=True):
            wanted = torch.cat([expected[start:stop] for start, stop in runs])
            assert rows.dtype == torch.float32
            torch.testing.assert_close(rows, wanted, rtol=2e-7, atol=1e-7)
            assert torch.equal(rows, stored.gather(name, runs))
            assert rows.nbytes == stored.gathered_bytes(name, runs)
    stored.check("a", 150, VOCAB, "here")
    assert stored.num_bytes("b") == 3 * (12 + 2 * VOCAB)
    assert len(stored.rows("b", 1, 3)) == 2


def blocks(file: Path, *rows: tuple[str, int, int, int, str, bytes]) -> Path:
    columns = dict(zip(LOGITS_SCHEMA.names, map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns, schema=LOGITS_SCHEMA), file)
    return file


def test_blocks_of_one_rollout_may_be_in_q16_and_halves(tmp_path: Path) -> None:
    rows = normal(4).astype(np.float16)
    file = blocks(
        tmp_path / "l.parquet",
        ("odd", 0, 1, 1, "float32", b"odd"),  # what follows lies at an odd address
        ("a", 0, 2, VOCAB, "q16", encoded(rows[:2])),
        ("a", 2, 2, VOCAB, "float16", rows[2:].tobytes()),
    )
    found = StoredLogits([file]).rows("a", 0, 4)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[:2].numpy(), by_the_schema(encoded(rows[:2]), VOCAB), rtol=2e-7, atol=1e-7)
    np.testing.assert_array_equal(found[2:].numpy(), rows[2:].astype(np.float32))


def test_a_row_group_larger_than_the_cache_is_never_held(tmp_path: Path) -> None:
    # GIVEN 64 blocks of 64 positions in one row group of 1 MB, and a cache of 200 kB
    rows = normal(64 * 64, 128)
    stored = StoredLogits([table_of(tmp_path / "l.parquet", 1 << 30, a=rows)], cache_bytes=200_000)
    expected = decoded(q16.encode(rows, "here"), 128)
    before = pa.total_allocated_bytes()
    for start in range(0, 64 * 64, 50):
        np.testing.assert_array_equal(stored.rows("a", start, start + 46).numpy(), expected[start : start + 46])
        assert pa.total_allocated_bytes() - before <= 200_000


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (np.array([[0, np.nan]], np.float32), "position 0 holds NaN"),
        (np.array([[0, 0], [0, INF]], np.float32), "position 1 holds NaN or"),
        (np.array([[0, 0], [-INF, -INF]], np.float32), "position 1 holds NaN or .* throughout"),
        (np.array([[0, 0], [0, -1e4]], np.float32), r"at position 1 span 10000 nats, q16 holds 1,000 at most"),
        (np.array([[0, -3.4e38], [0, 3.4e38]], np.float32), "at position 0 span 3.4e"),
        (np.array([[0, 0x7FC0]], np.uint16), "position 0 holds NaN"),
        (normal(2).astype(np.float64), "float64"),
        (normal(2)[0], "written from"),
    ],
    ids=["nan", "inf", "all-minus-inf", "wide", "widest", "bf16-nan", "double", "one-row"],
)
def test_values_that_cannot_be_stored_are_refused(tmp_path: Path, rows: Rows, said: str) -> None:
    with pytest.raises(BadInput, match=rf"rollout_id=a\).*{said}"):
        table_of(tmp_path / "l.parquet", a=rows)
    assert list(tmp_path.iterdir()) == []


def test_a_wide_row_behind_many_others_is_named_by_its_position() -> None:
    rows = normal(100, 5000)
    rows[77, 3] = 2000
    with pytest.raises(BadInput, match="position 77 ") as caught:
        q16.encode(rows, "file")
    assert caught.value.place == "file"
    assert "-inf" in caught.value.next_step
    assert len(encoded(np.array([[0, -1000]], np.float32))) == 16


def damaged(number: float, column: int, position: int = 2) -> bytes:
    rows = q16.encode(normal(4), "here")
    rows[position, 4 * column : 4 * column + 4] = np.array([number], "<f4").view(np.uint8)
    return rows.tobytes()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (damaged(-1e-3, 0), "the scale of q16 at position 2 is -0.001"),
        (damaged(np.nan, 0), "the scale of q16 at position 2 is nan"),
        (damaged(1.0, 0), "the scale of q16 at position 2 is 1"),
        (damaged(INF, 1), "the minimum of q16 at position 2 is inf"),
        (damaged(np.nan, 2), "the logsumexp of q16 at position 2 is nan"),
        (damaged(-3e38, 2), "the logsumexp of q16 at position 2 is -3e"),
        (encoded(normal(4))[:-1], r"data has 303 bytes, 4 rows of q16 \(three float32 and 32 uint16 each\) are 304"),
        (normal(4).astype("<f2").tobytes(), "data has 256 bytes, 4 rows of q16"),
        (encoded(normal(4))[:76] + b"\0" * 12 + b"\xff" * 64 + encoded(normal(2)), "logits at position 1 are -inf th"),
    ],
    ids=["negative", "nan", "coarse", "inf-minimum", "nan-sum", "huge-sum", "short", "halves", "all-minus-inf"],
)
def test_damaged_rows_are_refused_with_their_place(tmp_path: Path, data: bytes, said: str) -> None:
    # GIVEN a block that begins at position 0 and a good one behind it
    file = blocks(
        tmp_path / "l.parquet", ("a", 0, 4, VOCAB, "q16", data), ("a", 4, 4, VOCAB, "q16", encoded(normal(4)))
    )
    stored = StoredLogits([file])
    for start, stop in ((0, 8), (1, 3)):
        with pytest.raises(RowError, match=said) as caught:
            stored.rows("a", start, stop)
        assert f"{file}, rollout_id=a" in caught.value.place
        assert "schemas/rollout.md" in caught.value.next_step
    # THEN the block behind it is read
    assert len(stored.rows("a", 4, 8)) == 4


# End to end


def scored(folder: Path, rows: list[dict[str, Any]], encoding: Any, model: Path) -> list[dict[str, Any]]:
    """Scores of exact rows whose logits are stored in some encoding."""
    source = folder / encoding / "rollouts"
    source.mkdir(parents=True)
    with LogitsTableWriter(source / "logits-0.parquet", encoding) as writer:
        for row in rows:
            writer.add(row["rollout_id"], row["logits"])
    write_rollout_table(source / "a.parquet", as_table(rows))
    score([str(source)], str(folder / encoding / "out"), ScoreOptions(model=model))
    return list(pq.read_table(folder / encoding / "out" / "data" / "a.parquet").to_pylist())


def test_scores_are_those_of_the_float32_logits_but_for_the_step(checkpoint: Path, tmp_path: Path) -> None:
    # GIVEN rows of 1 to 150 positions; one is truncated, its logits with -inf
    lengths = [1, 5, 70, 150]
    rows = [rollout(i, "exact", length=length) for i, length in enumerate(lengths)]
    rows[1]["logits"] = with_holes(rows[1]["logits"], 0.3)
    own = np.take_along_axis(log_softmax(rows[1]["logits"]), np.array(rows[1]["response_ids"])[:, None], 1)[:, 0]
    rows[1]["response_ids"] = [
        token if np.isfinite(value) else VOCAB // 2 for token, value in zip(rows[1]["response_ids"], own, strict=True)
    ]
    rows[1]["rollout_logprobs"] = None
    found, expected = (scored(tmp_path, rows, encoding, checkpoint) for encoding in ("q16", "float32"))
    for mine, plain, row in zip(found, expected, rows, strict=True):
        span = float(spans(log_softmax(row["logits"])).max())
        lost = (span / 65535) ** 2 / 12
        assert mine["num_disagreements"] == plain["num_disagreements"] == 0
        assert mine["trainer_logprobs"] == plain["trainer_logprobs"]
        assert mine["trainer_entropy"] == plain["trainer_entropy"]
        # TV is a metric and at most sqrt(KL / 2) between stored and true; others change by a step times a log-ratio
        np.testing.assert_allclose(mine["tv"], plain["tv"], rtol=0, atol=math.sqrt(lost / 2) + 1e-6)
        for name in ("kl", "kl_reverse", "rollout_entropy", "rollout_logprobs"):
            np.testing.assert_allclose(mine[name], plain[name], rtol=0, atol=span / 65533 * 2 + 1e-6)
        assert mine["kl"] != plain["kl"] or len(row["response_ids"]) == 1


def test_a_sampled_value_that_does_not_fit_is_counted_and_rounding_is_not(checkpoint: Path, tmp_path: Path) -> None:
    rows = [rollout(i, "exact", length=60) for i in range(2)]
    rows[0]["rollout_logprobs"][7] -= 0.01
    assert [row["num_disagreements"] for row in scored(tmp_path, rows, "q16", checkpoint)] == [1, 0]
