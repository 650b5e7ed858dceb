"""Columns and their types, as schemas/rollout.md states them, and the conversion of what a file holds to these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from trm_audit.errors import BadInput, UsageError

SCHEMA_VERSION = "1"
KIND, VERSION = b"trm_audit.kind", b"trm_audit.schema_version"
FINGERPRINT, RUN, COUNTS, LOGITS = b"trm_audit.fingerprint", b"trm_audit.run", b"trm_audit.counts", b"trm_audit.logits"
FILTER = b"trm_audit.filter"

Kind = str  # rollouts, scores, training

Check = Callable[[pa.DataType], bool]


def _number(kind: pa.DataType) -> bool:
    return bool(pt.is_integer(kind) or pt.is_floating(kind))


def _text(kind: pa.DataType) -> bool:
    if pt.is_dictionary(kind):
        kind = kind.value_type
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind) or pt.is_integer(kind))


def _flag(kind: pa.DataType) -> bool:
    return bool(pt.is_boolean(kind) or pt.is_integer(kind))


def _bytes(kind: pa.DataType) -> bool:
    return bool(pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind))


def _list_of(inner: Check) -> Check:
    def check(kind: pa.DataType) -> bool:
        lists = pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)
        return bool(lists and (inner(kind.value_type) or pt.is_null(kind.value_type)))

    return check


@dataclass(frozen=True)
class Column:
    """One column of the rollout schema: its canonical type, what is accepted for it, and whether it must be there."""

    type: pa.DataType
    accepts: Check
    required: bool = False


ROLLOUT_COLUMNS: Mapping[str, Column] = {
    "rollout_id": Column(pa.string(), _text, required=True),
    "prompt_ids": Column(pa.list_(pa.int32()), _list_of(pt.is_integer), required=True),
    "response_ids": Column(pa.list_(pa.int32()), _list_of(pt.is_integer), required=True),
    "rollout_logprobs": Column(pa.list_(pa.float32()), _list_of(_number)),
    "rollout_topk_ids": Column(pa.list_(pa.list_(pa.int32())), _list_of(_list_of(pt.is_integer))),
    "rollout_topk_logprobs": Column(pa.list_(pa.list_(pa.float32())), _list_of(_list_of(_number))),
    "rollout_sketch": Column(pa.large_binary(), _bytes),
    "rollout_tail_mass": Column(pa.list_(pa.float32()), _list_of(_number)),
    "sketch_dim": Column(pa.int32(), pt.is_integer),
    "sketch_seed": Column(pa.int64(), pt.is_integer),
    "sketch_vocab_size": Column(pa.int32(), pt.is_integer),
    "rollout_entropy": Column(pa.list_(pa.float32()), _list_of(_number)),
    "group_id": Column(pa.string(), _text),
    "response_mask": Column(pa.list_(pa.bool_()), _list_of(_flag)),
    "reward": Column(pa.float64(), _number),
    "advantage": Column(pa.float64(), _number),
    "temperature": Column(pa.float64(), _number),
    "top_p": Column(pa.float64(), _number),
    "top_k": Column(pa.int64(), pt.is_integer),
    "logprobs_mode": Column(pa.string(), _text),
    "policy_version": Column(pa.int64(), lambda kind: bool(pt.is_integer(kind))),
    "engine": Column(pa.string(), _text),
    "finish_reason": Column(pa.string(), _text),
    "trainer_logprobs": Column(pa.list_(pa.float32()), _list_of(_number)),
    "routed_experts": Column(pa.list_(pa.list_(pa.list_(pa.int16()))), _list_of(_list_of(_list_of(pt.is_integer)))),
}

VERSION_PER_TOKEN = Column(pa.list_(pa.int64()), _list_of(pt.is_integer))
BULKY = (
    "rollout_topk_ids",
    "rollout_topk_logprobs",
    "rollout_sketch",
    "rollout_tail_mass",
    "rollout_entropy",
    "routed_experts",
)
"""Evidence that score shards leave behind; of the entropy they have a column of their own."""

BLOCK_COLUMNS: Mapping[str, Column] = {
    "rollout_id": Column(pa.string(), _text, required=True),
    "start": Column(pa.int64(), pt.is_integer, required=True),
    "count": Column(pa.int64(), pt.is_integer, required=True),
    "vocab_size": Column(pa.int64(), pt.is_integer, required=True),
    "encoding": Column(pa.string(), _text, required=True),
}
BLOCK_DATA = (pa.binary(), pa.large_binary())
"""Types that the column `data` of stored logits may have."""


def looks_like_rollouts(schema: pa.Schema) -> bool:
    """Whether a file without a kind in its footer is a rollout shard: it has the columns every rollout has."""
    return {"rollout_id", "prompt_ids", "response_ids"} <= set(schema.names)


def check_version(metadata: Mapping[bytes, bytes], place: str) -> None:
    """Raises BadInput for a schema version that this release does not know."""
    version = metadata.get(VERSION, SCHEMA_VERSION.encode()).decode("utf-8", "replace")
    if version != SCHEMA_VERSION:
        raise BadInput(
            f"schema version {version!r} is not known, only {SCHEMA_VERSION!r}",
            place=place,
            next_step="Use a trm-audit that knows it, or write the shard again.",
        )


def renamed(schema: pa.Schema, renames: Mapping[str, str], place: str) -> list[str]:
    """Column names after `--column ours=theirs`.

    Args:
        renames: ours -> theirs.
    """
    missing = [theirs for theirs in renames.values() if theirs not in schema.names]
    if missing:
        raise BadInput(
            f"column {missing[0]!r} named by --column is not there",
            place=place,
            next_step=f"Its columns are: {', '.join(schema.names)}.",
        )
    ours = {theirs: name for name, theirs in renames.items()}
    names = [ours.get(name, name) for name in schema.names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"after renaming, column {twice[0]!r} is there twice",
            place=place,
            next_step="Rename the other one with --column too, or drop it.",
        )
    return names


def conform(batch: pa.RecordBatch, columns: Mapping[str, Column], place: str) -> pa.RecordBatch:
    """The batch with known columns in canonical types; unknown ones as they are.

    Raises:
        BadInput: a required column is missing, or one has a type that cannot mean what the schema says.
    """
    for name, column in columns.items():
        if column.required and name not in batch.schema.names:
            raise BadInput(
                f"column {name!r} is missing",
                place=place,
                next_step=f"schemas/rollout.md lists the columns; --column {name}=THEIRS renames one of: "
                f"{', '.join(batch.schema.names)}.",
            )
    arrays = [
        _cast(batch.column(name), name, columns[name], place) if name in columns else batch.column(name)
        for name in batch.schema.names
    ]
    return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def _cast(array: pa.Array, name: str, column: Column, place: str) -> pa.Array:
    if name == "policy_version" and VERSION_PER_TOKEN.accepts(array.type):
        column = VERSION_PER_TOKEN
    if array.type == column.type:
        return array
    if pt.is_null(array.type):
        return pa.nulls(len(array), column.type)
    if not column.accepts(array.type):
        raise BadInput(
            f"column {name!r} is {array.type}, {column.type} is needed",
            place=place,
            next_step="Convert it, or rename it with --column if it means something else (schemas/rollout.md).",
        )
    try:
        return pc.cast(array, column.type, safe=not pt.is_floating(_leaf(column.type)))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise BadInput(f"column {name!r} does not fit {column.type}: {error}", place=place) from error


def _leaf(kind: pa.DataType) -> pa.DataType:
    while pt.is_list(kind):
        kind = kind.value_type
    return kind
