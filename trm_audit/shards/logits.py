"""Stored full logits: where each rollout's rows lie in the side files, and reading them.

The only module of this folder that needs torch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trm_audit.errors import BadInput, RowError
from trm_audit.shards import schema
from trm_audit.shards.read import ARROW_ERRORS, open_parquet, read_batches

ENCODINGS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STEPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative rounding error of a stored value."""
TENSOR_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Block:
    """Consecutive response positions of one rollout in one file.

    Attributes:
        file: the side file.
        start, count: positions.
        vocab_size: V.
        dtype: of the stored values.
        row_group, row: where `data` lies in a Parquet file; -1 in safetensors, where the rollout is one tensor.
    """

    file: Path
    start: int
    count: int
    vocab_size: int
    dtype: torch.dtype
    row_group: int = -1
    row: int = -1


class StoredLogits:
    """All side files of some shards, indexed by rollout; row groups are kept up to `CACHE_BYTES`.

    Args:
        files: `logits-*.parquet` (long tables, schemas/rollout.md) and `logits-*.safetensors`.

    Raises:
        BadInput: a file is damaged, has other columns, or an encoding that is not known.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._blocks: dict[str, list[Block]] = {}
        self._tensors: dict[Path, safe_open] = {}
        self._groups: OrderedDict[tuple[Path, int], pa.Array] = OrderedDict()
        self._files: dict[Path, pq.ParquetFile] = {}
        for file in files:
            blocks = _tensor_blocks(file) if file.suffix == ".safetensors" else _table_blocks(file)
            for rollout_id, block in blocks:
                self._blocks.setdefault(rollout_id, []).append(block)
        for blocks_of_one in self._blocks.values():
            blocks_of_one.sort(key=lambda block: block.start)

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
            wanted = vocab_size if vocab_size is not None else self._blocks[rollout_id][0].vocab_size
            if block.vocab_size != wanted and not (wider and block.vocab_size > wanted):
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
        return sum(b.count * b.vocab_size * b.dtype.itemsize for b in self._blocks.get(rollout_id, ()))

    def vocab_size(self, rollout_id: str) -> int:
        return self._blocks[rollout_id][0].vocab_size

    def step(self, rollout_id: str) -> float:
        """Largest relative rounding error of this rollout's stored values."""
        return max(STEPS[block.dtype] for block in self._blocks[rollout_id])

    def rows(self, rollout_id: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of one rollout, [stop - start, V] in the stored type.

        Raises:
            RowError: a value is NaN or +inf, a row is all -inf, or `data` is not count x V values long.
        """
        parts = []
        for block in self._blocks[rollout_id]:
            low, high = max(start, block.start), min(stop, block.start + block.count)
            if low < high:
                parts.append(self._read(rollout_id, block, low - block.start, high - block.start))
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        peak = logits.amax(1)  # NaN if any is NaN
        if not bool(peak.isfinite().all()):
            at = int(peak.isfinite().logical_not().nonzero()[0])
            what = (
                "contain NaN" if bool(peak[at].isnan()) else "contain +inf" if peak[at] > 0 else "are -inf throughout"
            )
            raise RowError(
                f"logits at position {start + at} {what}",
                place=f"{self._blocks[rollout_id][0].file}, rollout_id={rollout_id}",
                next_step="It has no distribution (schemas/rollout.md, rule 11): store it again, or leave it out.",
            )
        return logits

    def _read(self, rollout_id: str, block: Block, low: int, high: int) -> Tensor:
        if block.row < 0:
            if block.file not in self._tensors:
                self._tensors[block.file] = safe_open(str(block.file), framework="pt")
            view: Any = self._tensors[block.file]
            rows: Tensor = view.get_slice(rollout_id)[low:high]
            return rows
        data = self._group(block.file, block.row_group)[block.row].as_buffer()
        if data is None:
            raise RowError("data is null", place=f"{block.file}, rollout_id={rollout_id}, start={block.start}")
        if data.size != block.count * block.vocab_size * block.dtype.itemsize:
            raise RowError(
                f"data has {data.size} bytes, {block.count} x {block.vocab_size} values of {block.dtype} are "
                f"{block.count * block.vocab_size * block.dtype.itemsize}",
                place=f"{block.file}, rollout_id={rollout_id}, start={block.start}",
                next_step="See the long table in schemas/rollout.md.",
            )
        row_bytes = block.vocab_size * block.dtype.itemsize
        part = bytearray(memoryview(data)[low * row_bytes : high * row_bytes])
        return torch.frombuffer(part, dtype=block.dtype).reshape(high - low, block.vocab_size)

    def _group(self, file: Path, row_group: int) -> pa.Array:
        key = (file, row_group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        handle = self._files.setdefault(file, open_parquet(file))
        try:
            data = handle.read_row_group(row_group, columns=["data"]).column("data").combine_chunks()
        except ARROW_ERRORS as error:
            raise BadInput(f"row group {row_group} is damaged ({error})", place=str(file)) from error
        self._groups[key] = data
        while sum(array.nbytes for array in self._groups.values()) > CACHE_BYTES and len(self._groups) > 1:
            self._groups.popitem(last=False)
        return data


def _tensor_blocks(file: Path) -> Iterator[tuple[str, Block]]:
    try:
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                view = tensors.get_slice(name)
                shape, kind = view.get_shape(), view.get_dtype()
                if len(shape) != 2 or kind not in TENSOR_TYPES:
                    raise BadInput(
                        f"tensor {name!r} is {kind} {shape}, [tokens, vocabulary] in F32, F16 or BF16 is needed",
                        place=str(file),
                    )
                yield name, Block(file, 0, shape[0], shape[1], TENSOR_TYPES[kind])
    except (SafetensorError, OSError) as error:
        raise BadInput(f"cannot be read as safetensors ({error})", place=str(file)) from error


def _table_blocks(file: Path) -> Iterator[tuple[str, Block]]:
    names = open_parquet(file).schema_arrow.names
    for missing in (name for name in (*schema.BLOCK_COLUMNS, "data") if name not in names):
        raise BadInput(
            f"column {missing!r} is missing", place=str(file), next_step="See schemas/rollout.md, long table."
        )
    kind = open_parquet(file).schema_arrow.field("data").type
    if kind not in schema.BLOCK_DATA:
        raise BadInput(
            f"column 'data' is {kind}, large_binary is needed",
            place=str(file),
            next_step="See schemas/rollout.md, long table.",
        )
    for group in range(open_parquet(file).metadata.num_row_groups):
        row = 0
        for batch in read_batches(file, batch_rows=65536, columns=list(schema.BLOCK_COLUMNS), row_groups=[group]):
            for values in schema.conform(batch, schema.BLOCK_COLUMNS, str(file)).to_pylist():
                yield values["rollout_id"], _block(file, values, group, row)
                row += 1


def _block(file: Path, values: Mapping[str, object], group: int, row: int) -> Block:
    place = f"{file}, rollout_id={values['rollout_id']}"
    encoding = values["encoding"]
    if encoding not in ENCODINGS:
        raise BadInput(f"encoding {encoding!r} is not known", place=place, next_step=f"Known: {', '.join(ENCODINGS)}.")
    start, count, vocab = (values[name] for name in ("start", "count", "vocab_size"))
    if (
        not (isinstance(start, int) and isinstance(count, int) and isinstance(vocab, int))
        or min(count, vocab) < 1
        or start < 0
    ):
        raise BadInput(f"a block of start {start}, count {count}, vocab_size {vocab} is not possible", place=place)
    return Block(file, start, count, vocab, ENCODINGS[str(encoding)], group, row)
