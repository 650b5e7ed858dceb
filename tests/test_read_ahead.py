"""What is read ahead comes in order, as it would have come without, in bounded memory, and leaves no thread behind."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from some_rollouts import VOCAB

from trm_audit.errors import BadInput
from trm_audit.shards.logits import StoredLogits
from trm_audit.shards.read_ahead import ReadAhead, logits_ahead
from trm_audit.shards.rollout_writer import LogitsTableWriter

PATIENCE = 60.0
"""Seconds after which something that is waited for is not going to happen."""


def values(name: str, positions: int) -> np.ndarray:
    return np.random.default_rng(list(name.encode())).normal(size=(positions, VOCAB)).astype(np.float16)


def stored_in(folder: Path, kind: str, encoding: str, row_group_bytes: int = 1, **lengths: int) -> StoredLogits:
    file = folder / f"logits-0.{kind}"
    tensors = {name: torch.from_numpy(values(name, length).astype(np.float32)) for name, length in lengths.items()}
    dtype = getattr(torch, encoding)
    if kind == "safetensors":
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, file)
        return StoredLogits([file])
    with LogitsTableWriter(file, encoding, row_group_bytes=row_group_bytes) as writer:  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            halves = tensor.to(dtype)
            writer.add(name, halves.view(torch.uint16).numpy() if encoding == "bfloat16" else halves.numpy())
    return StoredLogits([file], cache_bytes=100_000)


def nothing_reads() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


class Result:
    """Something that can be counted while it is alive."""

    alive = 0

    def __init__(self, request: int) -> None:
        self.request = request
        Result.alive += 1
        weakref.finalize(self, Result.died)

    @staticmethod
    def died() -> None:
        Result.alive -= 1


@pytest.mark.parametrize("encoding", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
def test_logits_come_as_without_it(tmp_path: Path, kind: str, encoding: str) -> None:
    # GIVEN rollouts of several blocks in one row group each, and requests in another order with gaps between turns
    lengths = {"a": 150, "b": 3, "c": 64, "d": 400}
    stored = stored_in(tmp_path, kind, encoding, **lengths)
    rng = np.random.default_rng(0)
    requests = []
    for name in rng.choice(list(lengths), 60).tolist():
        cuts = np.sort(rng.choice(lengths[name] + 1, 2 * int(rng.integers(1, 3)), replace=False)).tolist()
        requests.append((name, list(zip(cuts[::2], cuts[1::2], strict=True))))
    # WHEN they are read ahead, by one thread or several
    for threads in (1, 3):
        with logits_ahead(stored, requests, max_bytes=40_000, threads=threads) as ahead:
            found = list(ahead)
        # THEN each is what its rows are, in the stored type
        for (name, runs), rows in zip(requests, found, strict=True):
            assert rows.dtype == getattr(torch, encoding)
            assert torch.equal(rows, torch.cat([stored.rows(name, start, stop) for start, stop in runs]))
    assert nothing_reads()


def test_no_more_is_taken_than_there_is_room_for() -> None:
    # GIVEN requests of size 10 and room for 3 of them
    taken = 0

    def requests() -> Iterator[int]:
        nonlocal taken
        for request in range(20):
            taken += 1
            yield request

    with ReadAhead(requests(), Result, lambda _: 10, max_bytes=35) as ahead:
        # THEN besides the one in use three are on their way, and one was looked at
        for asked, result in enumerate(ahead):
            assert result.request == asked
            assert taken <= asked + 1 + 3 + 1
            assert Result.alive <= 1 + 1 + 3  # `result` of the round before lives until it is replaced
    del result
    assert taken == 20
    assert Result.alive == 0


def test_what_is_larger_than_the_room_goes_alone() -> None:
    sizes, taken = [5, 100, 100, 5, 5], []
    with ReadAhead(range(5), lambda i: taken.append(i) or i, lambda i: sizes[i], max_bytes=10) as ahead:
        assert next(ahead) == 0
        assert next(ahead) == 1
        assert set(taken) <= {0, 1, 2}  # 2 is on its way, 3 has to wait for it
        assert list(ahead) == [2, 3, 4]
    assert list(ReadAhead([], int, int)) == []


def test_reading_goes_on_while_nobody_asks() -> None:
    # GIVEN a consumer that is busy
    third = threading.Event()
    with ReadAhead(range(9), lambda i: third.set() if i == 2 else None, lambda _: 1, max_bytes=3):
        # THEN the third request is read before it asked for the first
        assert third.wait(PATIENCE)


def test_what_a_reading_waits_for_is_prepared_side_by_side() -> None:
    # GIVEN work that two threads can only do together
    both = threading.Barrier(2)
    ready = {}

    def prepare(request: int, submit: object) -> None:
        ready[request] = submit(both.wait, PATIENCE)  # type: ignore[operator]

    with ReadAhead(range(6), lambda i: ready[i].result() >= 0, lambda _: 1, prepare=prepare, threads=2) as ahead:
        assert list(ahead) == [True] * 6


def test_an_error_comes_where_its_result_would_have_come() -> None:
    def read(request: int) -> int:
        if request == 2:
            raise BadInput("is damaged")
        return request

    with ReadAhead(range(5), read, lambda _: 1) as ahead:
        assert (next(ahead), next(ahead)) == (0, 1)
        with pytest.raises(BadInput, match="is damaged"):
            next(ahead)
        assert list(ahead) == [3, 4]


def test_a_damaged_row_group_is_an_error_at_its_own_request(tmp_path: Path) -> None:
    # GIVEN a flipped byte in the second of three row groups
    stored_in(tmp_path, "parquet", "float32", a=64, b=64, c=64)
    file = tmp_path / "logits-0.parquet"
    chunk = pq.read_metadata(file).row_group(1).column(5)
    content = bytearray(file.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size - 9] ^= 1
    file.write_bytes(bytes(content))
    stored = StoredLogits([file])
    with logits_ahead(stored, [(name, [(0, 64)]) for name in "abc"], threads=2) as ahead:
        assert len(next(ahead)) == 64
        with pytest.raises(BadInput, match=r"logits-0.parquet: row group 1 is damaged"):
            next(ahead)
        assert torch.equal(next(ahead), stored.rows("c", 0, 64))
    assert nothing_reads()


@pytest.mark.parametrize("why", [BadInput, RuntimeError, KeyboardInterrupt])
def test_no_thread_lives_on_however_the_block_is_left(why: type[BaseException]) -> None:
    read: list[int] = []
    ahead = ReadAhead(range(1000), read.append, lambda _: 1, max_bytes=5)

    def leave_early() -> None:
        with ahead:
            next(ahead)
            raise why("the consumer fails")

    with pytest.raises(why):
        leave_early()
    assert nothing_reads()
    assert 1 <= len(read) <= 7
    assert next(ahead, "nothing") == "nothing"


def test_logits_can_be_read_after_a_reading_that_was_given_up(tmp_path: Path) -> None:
    # GIVEN many row groups whose reading was begun and dropped
    stored = stored_in(tmp_path, "parquet", "float16", a=64 * 50)
    for _ in range(5):
        logits_ahead(stored, [("a", [(start, start + 64)]) for start in range(0, 64 * 50, 64)], threads=1).close()
    # THEN none of them is waited for in vain
    assert nothing_reads()
    np.testing.assert_array_equal(stored.rows("a", 0, 64 * 50).numpy(), values("a", 64 * 50))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_pinned_logits_are_the_same(tmp_path: Path) -> None:
    stored = stored_in(tmp_path, "parquet", "float16", a=150)
    with logits_ahead(stored, [("a", [(0, 10)]), ("a", [(3, 120)])], pin=True) as ahead:
        for rows, (start, stop) in zip(ahead, [(0, 10), (3, 120)], strict=True):
            assert rows.is_pinned()
            assert torch.equal(rows, stored.rows("a", start, stop))
