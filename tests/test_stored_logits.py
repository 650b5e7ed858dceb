"""Full logits beside a shard: found by rollout, read bit for bit in any encoding, and refused where they do not fit."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_checkpoint
from safetensors.torch import save_file
from some_rollouts import VOCAB, as_table, log_softmax, logits_of, rollout, write_shard

from trm_audit.errors import BadInput, RowError
from trm_audit.pipeline.score import ScoreOptions, score
from trm_audit.pipeline.selection import content_digest
from trm_audit.shards.logits import STEPS, StoredLogits
from trm_audit.shards.logits_index import KnownFiles, Stamp, index_files
from trm_audit.shards.rollout_writer import LOGITS_SCHEMA, LogitsTableWriter, write_rollout_table


def values(positions: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(positions, VOCAB)).astype(np.float32)


def table_of(file: Path, encoding: Any = "float32", row_group_bytes: int = 1 << 20, **logits: np.ndarray) -> Path:
    with LogitsTableWriter(file, encoding, row_group_bytes=row_group_bytes) as writer:
        for name, each in logits.items():
            writer.add(name, each)
    return file


def blocks(file: Path, *rows: tuple[str, int, int, int, str, bytes]) -> Path:
    columns = dict(zip(LOGITS_SCHEMA.names, map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns, schema=LOGITS_SCHEMA), file)
    return file


@pytest.mark.parametrize("row_group_bytes", [1, 1 << 20])
def test_any_range_of_positions_is_read_across_blocks(tmp_path: Path, row_group_bytes: int) -> None:
    # GIVEN 150 positions in blocks of 64, in one row group or several
    a, b = values(150), values(3, 1)
    stored = StoredLogits([table_of(tmp_path / "l.parquet", row_group_bytes=row_group_bytes, a=a, b=b)])
    for start, stop in ((0, 150), (0, 1), (63, 65), (60, 140), (149, 150)):
        np.testing.assert_array_equal(stored.rows("a", start, stop).numpy(), a[start:stop])
    np.testing.assert_array_equal(stored.rows("b", 0, 3).numpy(), b)
    assert "a" in stored
    assert "c" not in stored
    assert (stored.num_bytes("a"), stored.num_bytes("c")) == (150 * VOCAB * 4, 0)


def test_halves_and_bfloat16_come_back_as_they_were_stored(tmp_path: Path) -> None:
    x = torch.from_numpy(values(5))
    patterns = x.bfloat16().view(torch.uint16).numpy()
    half = StoredLogits([table_of(tmp_path / "h.parquet", "float16", a=x.half().numpy())])
    brain = StoredLogits([table_of(tmp_path / "b.parquet", "bfloat16", a=patterns)])
    assert torch.equal(half.rows("a", 0, 5), x.half())
    assert torch.equal(brain.rows("a", 0, 5), x.bfloat16())
    assert (half.step("a"), brain.step("a")) == (2.0**-11, 2.0**-8)


@pytest.mark.parametrize("dtype", STEPS)
def test_the_step_is_the_largest_relative_error_of_rounding(dtype: torch.dtype) -> None:
    x = torch.linspace(1, 2, 100_001, dtype=torch.float64)
    worst = float(((x.to(dtype).double() - x).abs() / x).max())
    assert 0.8 * STEPS[dtype] < worst <= STEPS[dtype]


def test_safetensors_hold_one_tensor_for_each_rollout(tmp_path: Path) -> None:
    x = torch.from_numpy(values(70))
    save_file({"a": x, "b": x[:2].bfloat16()}, tmp_path / "logits-0.safetensors")
    stored = StoredLogits([tmp_path / "logits-0.safetensors"])
    assert torch.equal(stored.rows("a", 3, 68), x[3:68])
    assert stored.step("b") == 2.0**-8
    stored.check("a", 70, VOCAB, "here")


@pytest.mark.parametrize(
    ("tensor", "said"), [(torch.zeros(4), r"F32 \[4\]"), (torch.zeros(2, 4, dtype=torch.int64), "I64")]
)
def test_a_tensor_of_another_kind_is_refused(tmp_path: Path, tensor: torch.Tensor, said: str) -> None:
    save_file({"a": tensor}, tmp_path / "logits-0.safetensors")
    with pytest.raises(BadInput, match=said):
        StoredLogits([tmp_path / "logits-0.safetensors"])


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "logits-0.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(BadInput, match="cannot be read as safetensors"):
        StoredLogits([tmp_path / "logits-0.safetensors"])


def data(count: int, vocab_size: int = 4) -> bytes:
    return np.zeros((count, vocab_size), "<f4").tobytes()


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([(0, 2), (3, 1)], "leave a gap at position 2"),
        ([(1, 3)], "leave a gap at position 0"),
        ([(0, 2), (1, 3)], "overlap at position 1"),
        ([(0, 4), (0, 4)], "overlap at position 0"),
        ([(0, 3)], "logits cover 3 positions, response_ids has 4 tokens"),
        ([(0, 5)], "logits cover 5 positions, response_ids has 4 tokens"),
    ],
)
def test_blocks_cover_each_position_once(tmp_path: Path, parts: list[tuple[int, int]], said: str) -> None:
    stored = StoredLogits([blocks(tmp_path / "l.parquet", *(("a", s, n, 4, "float32", data(n)) for s, n in parts))])
    with pytest.raises(RowError, match=said) as caught:
        stored.check("a", 4, None, "file, row 7")
    assert caught.value.place == "file, row 7"


def test_blocks_may_stand_in_any_order_and_in_several_files(tmp_path: Path) -> None:
    x = values(4)
    first = blocks(tmp_path / "1.parquet", ("a", 2, 2, VOCAB, "float32", x[2:].tobytes()))
    second = blocks(tmp_path / "2.parquet", ("a", 0, 2, VOCAB, "float32", x[:2].tobytes()))
    stored = StoredLogits([first, second])
    stored.check("a", 4, VOCAB, "here")
    np.testing.assert_array_equal(stored.rows("a", 0, 4).numpy(), x)


def test_vocabulary_sizes_have_to_agree_unless_both_sides_are_cut(tmp_path: Path) -> None:
    stored = StoredLogits([blocks(tmp_path / "l.parquet", ("a", 0, 4, 4, "float32", data(4)))])
    stored.check("a", 4, 4, "here")
    stored.check("a", 4, 3, "here", wider=True)
    for wanted, wider in ((3, False), (5, True)):
        with pytest.raises(RowError, match=rf"have 4 columns, {wanted} are needed(.|\n)*--vocab-size"):
            stored.check("a", 4, wanted, "here", wider=wider)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (("a", 0, 4, 4, "int4", data(4)), "encoding 'int4' is not known"),
        (("a", -1, 4, 4, "float32", data(4)), "start -1"),
        (("a", 0, 0, 4, "float32", b""), "count 0"),
        (("a", 0, 4, 0, "float32", b""), "vocab_size 0"),
    ],
)
def test_blocks_that_cannot_be_are_refused(tmp_path: Path, block: tuple[Any, ...], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        StoredLogits([blocks(tmp_path / "l.parquet", block)])


@pytest.mark.parametrize("damage", [b"", data(4)[:-1], data(5)])
def test_data_of_another_length_is_refused(tmp_path: Path, damage: bytes) -> None:
    stored = StoredLogits([blocks(tmp_path / "l.parquet", ("a", 0, 4, 4, "float32", damage))])
    with pytest.raises(RowError, match=f"data has {len(damage)} bytes, 4 x 4 values"):
        stored.rows("a", 0, 4)


@pytest.mark.parametrize(("value", "said"), [(np.nan, "contain NaN"), (np.inf, r"contain \+inf"), (None, "are -inf")])
def test_a_row_without_a_distribution_is_named_by_position(tmp_path: Path, value: float | None, said: str) -> None:
    x = values(6)
    x[4] = -np.inf if value is None else x[4]
    x[4, 1] = -np.inf if value is None else value
    stored = StoredLogits([blocks(tmp_path / "l.parquet", ("a", 0, 6, VOCAB, "float32", x.tobytes()))])
    assert len(stored.rows("a", 0, 4)) == 4
    with pytest.raises(RowError, match=f"logits at position 4 {said}"):
        stored.rows("a", 2, 6)


def test_minus_infinity_is_a_probability_of_0(tmp_path: Path) -> None:
    x = values(2)
    x[0, 3] = -np.inf
    stored = StoredLogits([table_of(tmp_path / "l.parquet", a=x)])
    assert bool(stored.rows("a", 0, 2)[0, 3].isneginf())


def test_a_flipped_byte_of_stored_logits_is_noticed(tmp_path: Path) -> None:
    file = table_of(tmp_path / "l.parquet", a=values(60))
    chunk = pq.ParquetFile(file).metadata.row_group(0).column(5)
    content = bytearray(file.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size - 9] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(BadInput, match="row group 0 is damaged"):
        StoredLogits([file]).rows("a", 0, 60)


def brain(x: np.ndarray) -> np.ndarray:
    """Bit patterns of bfloat16."""
    return torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()


STORED = {"float32": lambda x: x, "float16": lambda x: x.astype(np.float16), "bfloat16": brain}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("encoding", STORED)
def test_rows_of_one_block_are_a_view_and_no_copy(tmp_path: Path, encoding: str) -> None:
    stored = StoredLogits([table_of(tmp_path / "l.parquet", encoding, a=STORED[encoding](values(100)))])
    block, part = stored.rows("a", 0, 64), stored.rows("a", 3, 9)
    assert part.data_ptr() == block.data_ptr() + 3 * VOCAB * block.element_size()
    assert torch.equal(part, block[3:9])
    # rows of two blocks have to be put together
    both = stored.rows("a", 0, 65)
    assert both.data_ptr() != block.data_ptr()
    assert torch.equal(both[:64], block)


def arrow_bytes() -> int:
    """What Arrow holds, without what earlier tests left in cycles."""
    gc.collect()
    return pa.total_allocated_bytes()


def test_a_view_outlives_its_index_and_gives_its_memory_back(tmp_path: Path) -> None:
    x, before = values(64), arrow_bytes()
    stored = StoredLogits([table_of(tmp_path / "l.parquet", a=x)])
    view = stored.rows("a", 10, 20)
    del stored
    assert pa.total_allocated_bytes() >= before + x.nbytes
    np.testing.assert_array_equal(view.numpy(), x[10:20])
    del view
    assert pa.total_allocated_bytes() < before + x.nbytes // 2  # readers of other tests may keep a few small buffers


def test_rows_are_copied_once_views_would_hold_too_much(tmp_path: Path) -> None:
    # GIVEN a cache that is smaller than what Arrow holds in all
    x = values(64)
    stored = StoredLogits([table_of(tmp_path / "l.parquet", a=x)], cache_bytes=1)
    one, two = stored.rows("a", 0, 64), stored.rows("a", 0, 64)
    assert one.data_ptr() != two.data_ptr()
    np.testing.assert_array_equal(one.numpy(), x)


def test_a_block_behind_one_of_odd_length_is_copied_into_line(tmp_path: Path) -> None:
    x = values(2)
    file = blocks(
        tmp_path / "l.parquet", ("bad", 0, 1, 1, "float32", b"odd"), ("a", 0, 2, VOCAB, "float32", x.tobytes())
    )
    found = StoredLogits([file]).rows("a", 0, 2)
    assert found.data_ptr() % 4 == 0
    np.testing.assert_array_equal(found.numpy(), x)


@pytest.mark.parametrize("encoding", STORED)
@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
def test_runs_of_positions_are_gathered_in_order(tmp_path: Path, kind: str, encoding: str) -> None:
    x = torch.from_numpy(values(200)).to(DTYPES[encoding])
    file = tmp_path / f"logits-0.{kind}"
    if kind == "safetensors":
        save_file({"other": x[:7] + 1, "a": x, "more": x[:3] - 1}, file)
    else:
        table_of(file, encoding, row_group_bytes=1, a=STORED[encoding](values(200)))
    stored = StoredLogits([file])
    for runs in ([(0, 200)], [(5, 6)], [(3, 10), (60, 70), (71, 72), (120, 200)], [(64, 128), (199, 200)]):
        assert torch.equal(stored.gather("a", runs), torch.cat([x[start:stop] for start, stop in runs]))
        assert stored.gather("a", runs).nbytes == stored.gathered_bytes("a", runs)


def test_blocks_of_one_rollout_may_be_encoded_differently(tmp_path: Path) -> None:
    x = values(4).astype(np.float16)
    parts = [
        ("a", 0, 2, VOCAB, "float16", x[:2].tobytes()),
        ("a", 2, 2, VOCAB, "float32", x[2:].astype("<f4").tobytes()),
    ]
    stored = StoredLogits([blocks(tmp_path / "l.parquet", *parts)])
    np.testing.assert_array_equal(stored.rows("a", 0, 4).numpy(), x.astype(np.float32))
    assert stored.rows("a", 0, 2).dtype == torch.float16
    assert stored.step("a") == 2.0**-11


@pytest.mark.parametrize("runs", [[(0, 5)], [(4, 5)], [(1, 2), (3, 9)]])
def test_positions_that_no_block_holds_are_an_error(tmp_path: Path, runs: list[tuple[int, int]]) -> None:
    stored = StoredLogits([blocks(tmp_path / "l.parquet", ("a", 0, 4, 4, "float32", data(4)))])
    with pytest.raises(RowError, match="no block of logits holds position 4"):
        stored.gather("a", runs)


def test_missing_data_is_an_error(tmp_path: Path) -> None:
    file = blocks(tmp_path / "l.parquet", ("a", 0, 1, 4, "float32", data(1)), ("b", 0, 1, 4, "float32", None))
    with pytest.raises(RowError, match=r"rollout_id=b, start=0: data is null"):
        StoredLogits([file]).rows("b", 0, 1)


def test_the_check_can_be_left_to_whoever_uses_the_rows(tmp_path: Path) -> None:
    # GIVEN a row without a distribution behind a gap
    x = values(9)
    x[7, 2] = np.nan
    stored = StoredLogits([table_of(tmp_path / "l.parquet", a=values(9))])
    file = blocks(tmp_path / "bad.parquet", ("a", 0, 9, VOCAB, "float32", x.tobytes()))
    unchecked = StoredLogits([file])
    assert bool(unchecked.rows("a", 6, 9, check=False)[1, 2].isnan())
    # THEN it is named by its position in the response
    runs = [(0, 2), (6, 9)]
    with pytest.raises(RowError, match=r"bad.parquet, rollout_id=a: logits at position 7 contain NaN"):
        unchecked.diagnose("a", unchecked.gather("a", runs), runs)
    stored.diagnose("a", stored.gather("a", runs), runs)


def test_safetensors_that_were_cut_since_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "logits-0.safetensors"
    save_file({"a": torch.from_numpy(values(70))}, file)
    stored = StoredLogits([file])
    file.write_bytes(file.read_bytes()[:-100])
    assert len(stored.rows("a", 0, 60)) == 60
    with pytest.raises(BadInput, match="it was cut"):
        stored.rows("a", 0, 70)


def one_large_row_group(file: Path, x: np.ndarray) -> Path:
    """One position a block, all blocks in one row group of many pages."""
    columns = {
        "rollout_id": ["a"] * len(x),
        "start": range(len(x)),
        "count": [1] * len(x),
        "vocab_size": [x.shape[1]] * len(x),
        "encoding": ["float32"] * len(x),
        "data": [row.tobytes() for row in x],
    }
    table = pa.table({name: pa.array(column, LOGITS_SCHEMA.field(name).type) for name, column in columns.items()})
    pq.write_table(table, file, use_dictionary=False, write_batch_size=4, data_page_size=1, write_page_checksum=True)
    return file


def test_a_row_group_larger_than_the_cache_is_never_held(tmp_path: Path) -> None:
    # GIVEN 8 MB in one row group, and a cache of 1 MB
    x = np.random.default_rng(0).normal(size=(2048, 1024)).astype(np.float32)
    stored = StoredLogits([one_large_row_group(tmp_path / "l.parquet", x)], cache_bytes=1 << 20)
    before, most = arrow_bytes(), 0
    # WHEN it is read forwards, and backwards
    for start in (*range(0, 2048, 32), 1000, 900, 0):
        np.testing.assert_array_equal(stored.rows("a", start, start + 32).numpy(), x[start : start + 32])
        most = max(most, pa.total_allocated_bytes() - before)
    # THEN what stays in memory fits the cache
    assert most <= 1 << 20


def test_row_groups_that_were_used_last_stay_within_the_cache(tmp_path: Path) -> None:
    # GIVEN 40 row groups of 64 x 32 floats (8 kB), and room for 10
    x = values(40 * 64)
    stored = StoredLogits([table_of(tmp_path / "l.parquet", row_group_bytes=1, a=x)], cache_bytes=90_000)
    before = arrow_bytes()
    for block in (*range(40), 3, 20, 3):
        np.testing.assert_array_equal(
            stored.rows("a", 64 * block, 64 * block + 5)[:, 1].numpy(), x[64 * block :][:5, 1]
        )
        assert pa.total_allocated_bytes() - before <= 90_000


def test_several_threads_may_read_at_once(tmp_path: Path) -> None:
    x = values(20 * 64)
    stored = StoredLogits([table_of(tmp_path / "l.parquet", row_group_bytes=1, a=x)], cache_bytes=50_000)
    starts = np.random.default_rng(1).integers(0, 19 * 64, 200).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: stored.rows("a", start, start + 64), starts))
    for start, rows in zip(starts, found, strict=True):
        np.testing.assert_array_equal(rows.numpy(), x[start : start + 64])


def replace_unseen(file: Path) -> None:
    """Other content of the same size, with the time of the old one."""
    was = file.stat()
    file.write_bytes(b"\0" * was.st_size)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))


@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
def test_a_file_is_indexed_and_hashed_once_until_it_changes(tmp_path: Path, kind: str) -> None:
    # GIVEN a file that was indexed and hashed
    file, other = tmp_path / f"logits-0.{kind}", table_of(tmp_path / "l.parquet", b=values(3))
    table_of(file, a=values(5)) if kind == "parquet" else save_file({"a": torch.from_numpy(values(5))}, file)
    assert "a" in StoredLogits([file])
    digest = content_digest([file])
    # WHEN its content is gone but its size and time are the same
    replace_unseen(file)
    # THEN it was not read again, alone or with others
    assert {"a", "b"} <= set(index_files([file, other]))
    assert content_digest([file]) == digest
    # until it is another file by its time
    os.utime(file)
    assert content_digest([file]) != digest
    with pytest.raises(BadInput, match="cannot be read as"):
        StoredLogits([file])


def test_files_indexed_long_ago_are_forgotten(tmp_path: Path) -> None:
    known = KnownFiles(max_blocks=5)
    for k in range(4):
        file = table_of(tmp_path / f"{k}.parquet", a=values(150))
        known.blocks(Stamp(file, file.stat().st_size, file.stat().st_mtime_ns))
        assert len(known) == 3
    assert len(known.blocks(Stamp(table_of(tmp_path / "long.parquet", a=values(640)), 0, 0))) == len(known) == 10


def test_a_side_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"logits-0.parquet: cannot be read \(No such file"):
        StoredLogits([tmp_path / "logits-0.parquet"])


def scored(folder: Path, model: Path, **options: Any) -> list[dict[str, Any]]:
    score([str(folder / "rollouts")], str(folder / "out"), ScoreOptions(model=model, **options))
    return [row for file in sorted((folder / "out" / "data").iterdir()) for row in pq.read_table(file).to_pylist()]


def test_safetensors_and_long_table_give_the_same_scores(checkpoint: Path, tmp_path: Path) -> None:
    rows = [rollout(i, "exact") for i in range(3)]
    write_shard(tmp_path / "table" / "rollouts" / "a.parquet", rows)
    (tmp_path / "tensors" / "rollouts").mkdir(parents=True)
    write_rollout_table(tmp_path / "tensors" / "rollouts" / "a.parquet", as_table(rows))
    tensors = {row["rollout_id"]: torch.from_numpy(row["logits"]) for row in rows}
    save_file(tensors, tmp_path / "tensors" / "rollouts" / "logits-0.safetensors")
    assert scored(tmp_path / "table", checkpoint) == scored(tmp_path / "tensors", checkpoint)


def test_a_row_that_stores_no_sampled_values_gets_them_from_its_distribution(checkpoint: Path, tmp_path: Path) -> None:
    row = {**rollout(3, "exact", length=6), "rollout_logprobs": None}
    write_shard(tmp_path / "rollouts" / "a.parquet", [row])
    (found,) = scored(tmp_path, checkpoint)
    expected = log_softmax(logits_of(3, 6))[range(6), row["response_ids"]]
    np.testing.assert_allclose(found["rollout_logprobs"], expected, rtol=1e-5)


def test_a_sampled_value_that_does_not_fit_its_distribution_is_counted(checkpoint: Path, tmp_path: Path) -> None:
    row = rollout(3, "exact", length=6)
    row["rollout_logprobs"][2] -= 0.01
    write_shard(tmp_path / "rollouts" / "a.parquet", [row, rollout(4, "exact")])
    assert [found["num_disagreements"] for found in scored(tmp_path, checkpoint)] == [1, 0]


def padded(folder: Path, width: int) -> Path:
    """A shard whose stored logits have `width` columns, padding at -1e4 behind the vocabulary."""
    row = rollout(2, "exact", length=5)
    row["logits"] = np.concatenate([row["logits"], np.full((5, width - VOCAB), -1e4, np.float32)], axis=1)
    write_shard(folder / "rollouts" / "a.parquet", [row])
    return folder


def test_padded_vocabularies_are_refused_until_both_sides_are_cut(checkpoint: Path, tmp_path: Path) -> None:
    # GIVEN stored logits padded to 40 columns, a model padded to 64 whose first 32 are those of the checkpoint
    from transformers import LlamaForCausalLM

    wide = LlamaForCausalLM.from_pretrained(make_checkpoint(tmp_path / "wide", 64))
    narrow = LlamaForCausalLM.from_pretrained(checkpoint)
    state = wide.state_dict()
    for name, weight in narrow.state_dict().items():
        state[name][: len(weight)] = weight
    wide.save_pretrained(tmp_path / "wide")
    folder = padded(tmp_path, 40)
    for size, model in ((32, checkpoint), (64, tmp_path / "wide")):
        with pytest.raises(BadInput, match=f"logits have 40 columns, {size} are needed"):
            score([str(folder / "rollouts")], str(tmp_path / f"out-{size}"), ScoreOptions(model=model))
    # WHEN both are cut to 32
    (found,) = scored(folder, tmp_path / "wide", vocab_size=VOCAB)
    # THEN the scores are those of the unpadded logits and the small model
    write_shard(tmp_path / "plain" / "rollouts" / "a.parquet", [rollout(2, "exact", length=5)])
    (plain,) = scored(tmp_path / "plain", checkpoint)
    for name in ("kl", "kl_reverse", "tv", "trainer_logprobs", "trainer_entropy"):
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-4, atol=1e-6)
