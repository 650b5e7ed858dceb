"""Where each rollout's stored logits lie: which file, which row of which row group, or at which byte.

Side files are found by shard, and shards may share them all (schemas/rollout.md), so an index is made once for a file
and kept until the file changes. No values are read here.
"""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from trm_audit.errors import BadInput
from trm_audit.shards import q16, schema
from trm_audit.shards.read import open_parquet, read_batches

ENCODINGS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "q16": torch.uint16,  # its codes
}
TENSOR_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KNOWN_BLOCKS = 1 << 18
"""Blocks (about 200 bytes each) of files indexed before that are remembered."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive response positions of one rollout in one file.

    Attributes:
        file: the side file.
        start, count: positions.
        vocab_size: V.
        dtype: of the stored values.
        row_group, row: where `data` lies in a Parquet file; -1 in safetensors, where the rollout is one tensor.
        offset: byte of a safetensors file at which the tensor begins; -1 in Parquet.
    """

    file: Path
    start: int
    count: int
    vocab_size: int
    dtype: torch.dtype
    row_group: int = -1
    row: int = -1
    offset: int = -1

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one position."""
        if self.dtype == ENCODINGS["q16"]:
            return q16.row_bytes(self.vocab_size)
        return self.vocab_size * self.dtype.itemsize


Named = tuple[str, Block]


class Stamp(NamedTuple):
    """A file as it was when it was indexed: another size or time is another file."""

    file: Path
    num_bytes: int
    mtime_ns: int


def index_files(files: Sequence[Path]) -> Mapping[str, Sequence[Block]]:
    """Blocks of all files by rollout, in order of `start`. Not to be changed: it is shared with whoever asks again.

    Args:
        files: `logits-*.parquet` (long tables) and `logits-*.safetensors`.

    Raises:
        BadInput: a file is not there, is damaged, has other columns, or an encoding that is not known.
    """
    return _merged(tuple(map(_stamp, files)))


def _stamp(file: Path) -> Stamp:
    try:
        found = file.stat()
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})", place=str(file)) from error
    return Stamp(file, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1)
def _merged(stamps: tuple[Stamp, ...]) -> Mapping[str, Sequence[Block]]:
    out: dict[str, list[Block]] = {}
    for name, block in itertools.chain.from_iterable(map(_KNOWN.blocks, stamps)):
        out.setdefault(name, []).append(block)
    for blocks in out.values():
        blocks.sort(key=lambda block: block.start)
    return out


class KnownFiles:
    """Indices of the files used last, up to `max_blocks` blocks and always the last one."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks, self._lock = max_blocks, Lock()
        self._files: OrderedDict[Stamp, list[Named]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._files.values()))

    def blocks(self, stamp: Stamp) -> list[Named]:
        """Blocks of one file, in the file's order."""
        with self._lock:
            if stamp not in self._files:
                found = _tensor_blocks(stamp.file) if stamp.file.suffix == ".safetensors" else _table_blocks(stamp.file)
                self._files[stamp] = list(found)
            self._files.move_to_end(stamp)
            while len(self._files) > 1 and len(self) > self._max_blocks:
                self._files.popitem(last=False)
            return self._files[stamp]


_KNOWN = KnownFiles(KNOWN_BLOCKS)


def _tensor_blocks(file: Path) -> Iterator[Named]:
    try:
        with safe_open(str(file), framework="pt") as tensors:  # holds the header against the file
            begins = _tensor_offsets(file)
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                view = tensors.get_slice(name)
                shape, kind = view.get_shape(), view.get_dtype()
                if len(shape) != 2 or kind not in TENSOR_TYPES:
                    raise BadInput(
                        f"tensor {name!r} is {kind} {shape}, [tokens, vocabulary] in F32, F16 or BF16 is needed",
                        place=str(file),
                    )
                yield name, Block(file, 0, shape[0], shape[1], TENSOR_TYPES[kind], offset=begins[name])
    except (SafetensorError, OSError) as error:
        raise BadInput(f"cannot be read as safetensors ({error})", place=str(file)) from error


def _tensor_offsets(file: Path) -> dict[str, int]:
    """Byte at which each tensor begins. A file is the header's length (8 bytes), the header (JSON), the values."""
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header: dict[str, Any] = json.loads(handle.read(length))
    return {name: 8 + length + at["data_offsets"][0] for name, at in header.items() if name != "__metadata__"}


def _table_blocks(file: Path) -> Iterator[Named]:
    table = open_parquet(file)
    names = table.schema_arrow.names
    for missing in (name for name in (*schema.BLOCK_COLUMNS, "data") if name not in names):
        raise BadInput(
            f"column {missing!r} is missing", place=str(file), next_step="See schemas/rollout.md, long table."
        )
    kind = table.schema_arrow.field("data").type
    if kind not in schema.BLOCK_DATA:
        raise BadInput(
            f"column 'data' is {kind}, large_binary is needed",
            place=str(file),
            next_step="See schemas/rollout.md, long table.",
        )
    groups = (table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups))
    rows = ((group, row) for group, num_rows in enumerate(groups) for row in range(num_rows))
    for values, (group, row) in zip(_block_rows(file), rows, strict=False):  # counted by read_batches
        yield values["rollout_id"], _block(file, values, group, row)


def _block_rows(file: Path) -> Iterable[dict[str, Any]]:
    for batch in read_batches(file, batch_rows=65536, columns=list(schema.BLOCK_COLUMNS)):
        yield from schema.conform(batch, schema.BLOCK_COLUMNS, str(file)).to_pylist()


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
