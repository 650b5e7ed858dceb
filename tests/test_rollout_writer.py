"""What rollout_writer writes is what schemas/rollout.md says: footers, blocks, encodings, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trm_audit.errors import BadInput, UsageError
from trm_audit.shards.rollout_writer import LogitsTableWriter, write_rollout_table


def some_logits(positions: int, vocab_size: int = 7) -> np.ndarray:
    return np.random.default_rng(positions).normal(size=(positions, vocab_size)).astype(np.float32)


def write(path: Path, encoding: str, **logits: np.ndarray) -> pa.Table:
    with LogitsTableWriter(path, encoding) as writer:
        for rollout_id, values in logits.items():
            writer.add(rollout_id, values)
    return pq.read_table(path)


def test_the_footer_says_what_the_file_is(tmp_path: Path) -> None:
    table = pa.table({"rollout_id": ["a"]}, metadata={"mine": "kept"})
    write_rollout_table(tmp_path / "r.parquet", table, logits=["logits-00000.parquet"])
    footer = pq.read_schema(tmp_path / "r.parquet").metadata
    assert footer[b"trm_audit.kind"] == b"rollouts"
    assert footer[b"trm_audit.schema_version"] == b"1"
    assert json.loads(footer[b"trm_audit.logits"]) == ["logits-00000.parquet"]
    assert footer[b"mine"] == b"kept"


def test_without_side_files_the_footer_names_none(tmp_path: Path) -> None:
    write_rollout_table(tmp_path / "r.parquet", pa.table({"rollout_id": ["a"]}))
    assert b"trm_audit.logits" not in pq.read_schema(tmp_path / "r.parquet").metadata


@pytest.mark.parametrize("name", ["rollouts.parquet", "logits-00000.parquet"])
def test_a_flipped_byte_is_noticed_by_the_page_checksum(tmp_path: Path, name: str) -> None:
    # GIVEN a file of either kind
    path = tmp_path / name
    if name.startswith("logits"):
        write(path, "float32", a=some_logits(3))
    else:
        write_rollout_table(path, pa.table({"rollout_id": ["a", "b"]}))
    # WHEN the last byte of its data page flips
    row_group = pq.ParquetFile(path).metadata.row_group(0)
    chunk = row_group.column(row_group.num_columns - 1)
    content = bytearray(path.read_bytes())
    content[first_byte(chunk) + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    # THEN a reader that verifies checksums fails
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


def first_byte(chunk: pq.ColumnChunkMetaData) -> int:
    return chunk.dictionary_page_offset or chunk.data_page_offset


def test_long_responses_are_cut_into_blocks_of_64_positions(tmp_path: Path) -> None:
    logits = some_logits(130)
    table = write(tmp_path / "logits-00000.parquet", "float32", a=logits)
    assert table["start"].to_pylist() == [0, 64, 128]
    assert table["count"].to_pylist() == [64, 64, 2]
    joined = np.frombuffer(b"".join(table["data"].to_pylist()), "<f4").reshape(130, 7)
    np.testing.assert_array_equal(joined, logits)


def test_the_long_table_has_the_columns_of_the_schema(tmp_path: Path) -> None:
    table = write(tmp_path / "logits-00000.parquet", "float16", a=some_logits(2))
    assert table.schema.remove_metadata() == pa.schema(
        [
            ("rollout_id", pa.string()), ("start", pa.int32()), ("count", pa.int32()), ("vocab_size", pa.int32()),
            ("encoding", pa.string()), ("data", pa.large_binary()),
        ]
    )  # fmt: skip
    assert table["encoding"].to_pylist() == ["float16"]
    assert table["vocab_size"].to_pylist() == [7]


def test_logits_are_stored_plain_for_speed(tmp_path: Path) -> None:
    path = tmp_path / "logits-00000.parquet"
    write(path, "float32", a=some_logits(64))
    data = pq.ParquetFile(path).metadata.row_group(0).column(5)
    assert data.compression == "UNCOMPRESSED"
    assert not data.is_stats_set
    assert data.dictionary_page_offset is None


def test_row_groups_are_closed_at_the_given_size(tmp_path: Path) -> None:
    path = tmp_path / "logits-00000.parquet"
    with LogitsTableWriter(path, "float32", row_group_bytes=2 * 64 * 7 * 4) as writer:
        writer.add("a", some_logits(5 * 64))
    assert [pq.ParquetFile(path).metadata.row_group(i).num_rows for i in range(3)] == [2, 2, 1]


def test_halves_and_bfloat16_round_trip_bit_for_bit(tmp_path: Path) -> None:
    halves = some_logits(3).astype(np.float16)
    patterns = (some_logits(3).view(np.uint32) >> 16).astype(np.uint16)
    stored_halves = write(tmp_path / "logits-0.parquet", "float16", a=halves)["data"][0].as_py()
    stored_patterns = write(tmp_path / "logits-1.parquet", "bfloat16", a=patterns)["data"][0].as_py()
    assert stored_halves == halves.tobytes()
    assert stored_patterns == patterns.tobytes()


def test_an_empty_response_adds_no_block(tmp_path: Path) -> None:
    assert write(tmp_path / "logits-00000.parquet", "float32", a=some_logits(0)).num_rows == 0


def test_minus_infinity_is_a_probability_of_zero_and_allowed(tmp_path: Path) -> None:
    logits = some_logits(2)
    logits[0, 3] = -np.inf
    stored = write(tmp_path / "logits-00000.parquet", "float16", a=logits)["data"][0].as_py()
    assert np.isneginf(np.frombuffer(stored, "<f2").reshape(2, 7)[0, 3])


@pytest.mark.parametrize(
    ("encoding", "fault"),
    [
        ("float32", np.full((1, 4), np.nan, np.float32)),
        ("float32", np.full((1, 4), -np.inf, np.float32)),
        ("float16", np.array([[0.0, 7e4]], np.float32)),
        ("float16", np.array([[0.0, -7e4]], np.float32)),
        ("bfloat16", np.array([[0, 0x7F80]], np.uint16)),
        ("bfloat16", np.array([[0, 0x7FC0]], np.uint16)),
        ("bfloat16", some_logits(2)),
        ("float32", some_logits(2).astype(np.float64)),
        ("float32", some_logits(2)[0]),
    ],
    ids=["nan", "all-inf", "above-half", "below-half", "bf16-inf", "bf16-nan", "bf16-values", "double", "one-row"],
)
def test_values_that_the_schema_forbids_are_refused(tmp_path: Path, encoding: str, fault: np.ndarray) -> None:
    with pytest.raises(BadInput, match="rollout_id=a"):
        write(tmp_path / "logits-00000.parquet", encoding, a=fault)


def test_a_rollout_is_added_once(tmp_path: Path) -> None:
    with LogitsTableWriter(tmp_path / "logits-00000.parquet", "float32") as writer:
        writer.add("a", some_logits(2))
        with pytest.raises(BadInput, match="added before"):
            writer.add("a", some_logits(2))


def test_pieces_of_a_long_response_follow_one_another_without_a_gap(tmp_path: Path) -> None:
    x = some_logits(150)
    with LogitsTableWriter(tmp_path / "logits-pieces.parquet", "float32") as writer:
        with pytest.raises(BadInput, match="begins at 3, 0 is next"):
            writer.add("a", x, start=3)
        writer.add("a", x[:70])
        with pytest.raises(BadInput, match="begins at 60, 70 is next"):
            writer.add("a", x[60:], start=60)
        writer.add("a", x[70:], start=70)
    table = pq.read_table(tmp_path / "logits-pieces.parquet")
    assert table["start"].to_pylist() == [0, 64, 70, 134]
    np.testing.assert_array_equal(np.frombuffer(b"".join(table["data"].to_pylist()), np.float32), x.ravel())


def test_a_writer_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with LogitsTableWriter(tmp_path / "logits-00000.parquet", "float32") as writer:
            writer.add("a", some_logits(2))
            writer.add("b", np.full((1, 7), np.nan, np.float32))

    with pytest.raises(BadInput):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_encoding_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="float32, float16, bfloat16, q16"):
        LogitsTableWriter(tmp_path / "logits-00000.parquet", "int4")  # type: ignore[arg-type]
