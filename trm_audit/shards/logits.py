"""Stored full logits: reading each rollout's rows from the side files beside a shard.

With `logits_index` the only modules of this folder that need torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from trm_audit.errors import BadInput, RowError
from trm_audit.shards import q16
from trm_audit.shards.logits_index import Block, index_files
from trm_audit.shards.row_groups import RowGroups

STEPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative rounding error of a stored value."""
Q16_STEP = 2.0**-16
"""The same of `q16`, relative to the span of a row's values: half a step of a value, and half of its normaliser."""
ARROW_TYPES = {torch.float32: pa.float32(), torch.float16: pa.float16(), torch.bfloat16: pa.uint16()}
"""What can be handed out as it lies in the file."""
CODES = torch.uint16
"""The type of a block in `q16`, which is handed out as float32."""
CACHE_BYTES = 512 << 20

Runs = Sequence[tuple[int, int]]
"""Ranges start..stop of response positions, in order: between two turns of a dialogue lie tool tokens."""
Part = tuple[Block, int, int]


class StoredLogits:
    """All side files of some shards, indexed by rollout. Its methods may be called from several threads at once.

    Args:
        files: `logits-*.parquet` (long tables, schemas/rollout.md) and `logits-*.safetensors`.
        cache_bytes: row groups are kept up to this size together; what is being read comes on top.

    Raises:
        BadInput: a file is damaged, has other columns, or an encoding that is not known.
    """

    def __init__(self, files: Sequence[Path], cache_bytes: int = CACHE_BYTES) -> None:
        self._blocks = index_files(files)
        self._cache_bytes, self._groups = cache_bytes, RowGroups(cache_bytes)

    def __contains__(self, rollout_id: str) -> bool:
        return rollout_id in self._blocks

    def check(
        self, rollout_id: str, num_tokens: int, vocab_size: int | None, place: str, *, wider: bool = False
    ) -> None:
        """Raises RowError unless the blocks cover 0..num_tokens once, all this wide (or `wider`, to be cut)."""
        at = 0
        for block in self._blocks[rollout_id]:
            where = f"{block.file.name}, rollout_id={rollout_id}"
            if block.start != at:
                what = "leave a gap at" if block.start > at else "overlap at"
                raise RowError(
                    f"blocks of logits {what} position {min(at, block.start)} ({where})",
                    place=place,
                    next_step="Each response position is stored exactly once (schemas/rollout.md, rule 11).",
                )
            at += block.count
            first = self._blocks[rollout_id][0].vocab_size
            wanted = first if vocab_size is None or (wider and first > vocab_size) else vocab_size
            if block.vocab_size != wanted:
                raise RowError(
                    f"logits have {block.vocab_size} columns, {wanted} are needed ({where})",
                    place=place,
                    next_step="If the difference is padding, --vocab-size N cuts both sides to the first N.",
                )
        if at != num_tokens:
            raise RowError(
                f"logits cover {at} positions, response_ids has {num_tokens} tokens",
                place=place,
                next_step="Each response position is stored exactly once (schemas/rollout.md, rule 11).",
            )

    def num_bytes(self, rollout_id: str) -> int:
        """Stored bytes of one rollout, 0 if there are none."""
        return sum(b.count * b.row_bytes for b in self._blocks.get(rollout_id, ()))

    def vocab_size(self, rollout_id: str) -> int:
        return self._blocks[rollout_id][0].vocab_size

    def step(self, rollout_id: str) -> float:
        """Largest relative rounding error of this rollout's stored values."""
        return max(STEPS.get(block.dtype, Q16_STEP) for block in self._blocks[rollout_id])

    def rows(self, rollout_id: str, start: int, stop: int, *, check: bool = True) -> Tensor:
        """Rows start..stop of one rollout, [stop - start, V], of the type that `gather` returns; not to be written to.

        Args:
            rollout_id: one that is in here.
            start, stop: response positions.
            check: look at every value (`diagnose`); without it whoever uses the rows has to.

        Raises:
            RowError: a value is NaN or +inf, a row is all -inf, `data` is not count x V values long, or the numbers of
                a q16 row are no such numbers.
            BadInput: the file is damaged, or was cut since it was indexed.
        """
        logits = self.gather(rollout_id, [(start, stop)])
        if check:
            self.diagnose(rollout_id, logits, [(start, stop)])
        return logits

    def gather(self, rollout_id: str, runs: Runs, *, pin: bool = False) -> Tensor:
        """Rows of some runs one after another, [n, V] in the stored type, `q16` as float32. No value is checked.

        Not to be written to: where one block of a long table holds them all, they are Arrow's memory and not a copy.
        Such a view keeps its whole row group alive, so there are none while Arrow holds half as much again as
        `cache_bytes`.

        Args:
            rollout_id: one that is in here.
            runs: response positions.
            pin: into page-locked memory, from which a GPU copies at full speed (needs one).

        Raises:
            RowError: `data` is not count x V values long, or the numbers of a q16 row are no such numbers.
            BadInput: the file is damaged, or was cut since it was indexed.
        """
        parts = list(self._parts(rollout_id, runs))
        if len(parts) == 1 and not pin and pa.total_allocated_bytes() <= 1.5 * self._cache_bytes:
            view = self._view(rollout_id, parts[0])
            if view is not None:
                return view
        if len({block.dtype for block, _, _ in parts}) == 1:
            return self._copy(rollout_id, parts, pin=pin)
        mixed = torch.cat([self._copy(rollout_id, [part], pin=False) for part in parts])  # the widest type holds all
        return mixed.pin_memory() if pin else mixed

    def gathered_bytes(self, rollout_id: str, runs: Runs) -> int:
        """Size of what `gather` returns, where a rollout is stored in one encoding."""
        block = self._blocks[rollout_id][0]
        return sum(stop - start for start, stop in runs) * block.vocab_size * _type_of(block).itemsize

    def read_soon(self, rollout_id: str, runs: Runs, submit: Callable[[Callable[[], Any]], Future[Any]]) -> None:
        """Begins to read the row groups that some runs need in another thread; `submit` is what an executor has."""
        for block, _, _ in self._parts(rollout_id, runs):
            if block.row >= 0:
                self._groups.read_soon(block.file, block.row_group, submit)

    def diagnose(self, rollout_id: str, logits: Tensor, runs: Runs) -> None:
        """Raises RowError if one of `logits` [n, V], the rows of `runs`, has no distribution: NaN, +inf, all -inf."""
        peak = logits.amax(1)  # NaN if any is NaN
        if bool(peak.isfinite().all()):
            return
        at = int(peak.isfinite().logical_not().nonzero()[0])
        what = "contain NaN" if bool(peak[at].isnan()) else "contain +inf" if peak[at] > 0 else "are -inf throughout"
        position = [position for start, stop in runs for position in range(start, stop)][at]
        raise RowError(
            f"logits at position {position} {what}",
            place=f"{self._blocks[rollout_id][0].file}, rollout_id={rollout_id}",
            next_step="It has no distribution (schemas/rollout.md, rule 11): store it again, or leave it out.",
        )

    def _parts(self, rollout_id: str, runs: Runs) -> Iterator[Part]:
        """(block, low, high): rows low..high of each block that the runs touch, in order."""
        blocks = self._blocks[rollout_id]
        for start, stop in runs:
            at = max(0, bisect_right(blocks, start, key=lambda block: block.start) - 1)
            while start < stop:
                if at == len(blocks) or not blocks[at].start <= start < blocks[at].start + blocks[at].count:
                    raise RowError(
                        f"no block of logits holds position {start}",
                        place=f"{blocks[0].file}, rollout_id={rollout_id}",
                        next_step="Each response position is stored exactly once (schemas/rollout.md, rule 11).",
                    )
                block = blocks[at]
                high = min(stop, block.start + block.count)
                yield block, start - block.start, high - block.start
                start, at = high, at + 1

    def _copy(self, rollout_id: str, parts: Sequence[Part], *, pin: bool) -> Tensor:
        """Parts of one type one after another. Copied by one thread, without the interpreter's lock."""
        block = parts[0][0]
        out = torch.empty(
            sum(high - low for _, low, high in parts), block.vocab_size, dtype=_type_of(block), pin_memory=pin
        )
        target, at = out.view(torch.uint8).numpy(), 0
        for block, low, high in parts:
            rows = target[at : at + high - low]
            at += high - low
            if block.row < 0:
                _read_tensor(block, low, rows)
            else:
                data = np.frombuffer(self._data(rollout_id, block, low, high), np.uint8).reshape(len(rows), -1)
                if block.dtype == CODES:
                    q16.decode(data, rows.view(np.float32), _place(block, rollout_id), block.start + low)
                else:
                    np.copyto(rows, data)
        return out

    def _view(self, rollout_id: str, part: Part) -> Tensor | None:
        """A part without a copy, [high - low, V]; None where it cannot be: in safetensors, q16, or unaligned."""
        block, low, high = part
        as_it_is = block.row >= 0 and block.dtype in ARROW_TYPES
        data = self._data(rollout_id, block, low, high) if as_it_is else None
        if data is None or data.address % block.dtype.itemsize:
            return None
        values = pa.Array.from_buffers(ARROW_TYPES[block.dtype], (high - low) * block.vocab_size, [None, data])
        # DLPack hands the buffer over and keeps it alive; torch.frombuffer would warn that it is read-only
        view: Tensor = from_dlpack(values).view(block.dtype)
        return view.reshape(high - low, block.vocab_size)

    def _data(self, rollout_id: str, block: Block, low: int, high: int) -> pa.Buffer:
        """Bytes of rows low..high of a block of a long table."""
        place = _place(block, rollout_id)
        data = self._groups.data(block.file, block.row_group, block.row)
        if data is None:
            raise RowError("data is null", place=place)
        if data.size != block.count * block.row_bytes:
            values = f"{block.count} x {block.vocab_size} values of {block.dtype}"
            if block.dtype == CODES:
                values = f"{block.count} rows of q16 (three float32 and {block.vocab_size} uint16 each)"
            raise RowError(
                f"data has {data.size} bytes, {values} are {block.count * block.row_bytes}",
                place=place,
                next_step="See the long table in schemas/rollout.md.",
            )
        return data.slice(low * block.row_bytes, (high - low) * block.row_bytes)


def _type_of(block: Block) -> torch.dtype:
    """Of the values that are handed out."""
    return torch.float32 if block.dtype == CODES else block.dtype


def _place(block: Block, rollout_id: str) -> str:
    return f"{block.file}, rollout_id={rollout_id}, start={block.start}"


def _read_tensor(block: Block, low: int, rows: NDArray[np.uint8]) -> None:
    """Reads a safetensors file from row `low` of a tensor into `rows` [n, bytes of a row].

    Straight from the file: a slice of the mapped file would be read when it is first used, by whoever waits for it.
    """
    left = rows.data.cast("B")
    try:
        with open(block.file, "rb", buffering=0) as handle:
            handle.seek(block.offset + low * block.row_bytes)
            while left:
                count = handle.readinto(left)
                if not count:
                    raise BadInput("ends before its tensors do: it was cut", place=str(block.file))
                left = left[count:]
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})", place=str(block.file)) from error
