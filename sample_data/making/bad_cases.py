"""One small file or folder per way of being bad, with what a reader should say about it: the folder `bad/`.

Every case starts from three good rows of the tiny vocabulary and breaks one thing: in the middle row, where it is a row
that breaks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from making import digit_sums as task
from making.bad_models import MODEL_CASES
from making.bad_rows import ROW_CASES, Row, as_table, good_row

from trm_audit.shards import q16
from trm_audit.shards.rollout_writer import LOGITS_SCHEMA, write_rollout_table

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """One way of being bad.

    Attributes:
        path: file or folder, relative to `bad/`.
        kind: `rollouts`, or `model` for a checkpoint folder.
        rule: of schemas/rollout.md, or None where the file breaks before any rule.
        row: index of the bad row, or None.
        needs_model: the fault shows only beside `tiny/model`.
        what: what is wrong.
        phrase: words that a message should contain.
    """

    path: str
    kind: str
    rule: int | None
    row: int | None
    needs_model: bool
    what: str
    phrase: str


def make(folder: Path) -> None:
    """Write `folder` anew: every case, `cases.json` and `README.md`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cases = [_row_case(folder, *case) for case in ROW_CASES]
    cases += [_logits_case(folder, *case) for case in LOGITS_CASES]
    cases += _file_cases(folder)
    for name, what, phrase, write in MODEL_CASES:
        (folder / "models" / name).mkdir(parents=True)
        write(folder / "models" / name)
        cases.append(Case(f"models/{name}", "model", None, None, True, what, phrase))
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases], indent=1) + "\n")
    (folder / "README.md").write_text(_readme(cases))


def _row_case(
    folder: Path, name: str, rule: int, needs_model: bool, what: str, phrase: str, fault: Callable[[Row], Any]
) -> Case:
    rows = [good_row(index) for index in range(3)]
    fault(rows[1])
    write_rollout_table(folder / f"{name}.parquet", as_table(rows))
    return Case(f"{name}.parquet", "rollouts", rule, 1, needs_model, what, phrase)


def _block(row: int, start: int, count: int, vocab_size: int = task.VOCAB_SIZE) -> Row:
    """A good block of the long table, float32 values from a fixed seed."""
    values = np.random.default_rng(row).normal(size=(4, vocab_size)).astype("<f4")[start : start + count]
    return {
        "rollout_id": f"good-{row}",
        "start": start,
        "count": count,
        "vocab_size": vocab_size,
        "encoding": "float32",
        "data": values.tobytes(),
    }


def _with_value(value: float, *, throughout: bool = False) -> Row:
    block = _block(1, 0, 4)
    values = np.frombuffer(block["data"], "<f4").reshape(4, -1).copy()
    values[2, slice(None) if throughout else 5] = value
    return {**block, "data": values.tobytes()}


def _in_q16(column: int = 0, number: float | None = None, *, least: int = 0) -> Row:
    """A block in q16; `number` stands in a column of the three at position 2, and rows begin with byte `least`."""
    block = _block(1, 0, 4)
    rows = q16.encode(np.frombuffer(block["data"], "<f4").reshape(4, -1), "bad_cases")
    if number is not None:
        rows[2, 4 * column : 4 * column + 4] = np.array([number], "<f4").view(np.uint8)
    return {**block, "encoding": "q16", "data": rows[:, least:].tobytes()}


LOGITS_CASES: list[tuple[str, bool, str, str, list[Row]]] = [
    (
        "logits-of-other-vocabulary",
        True,
        "logits have 32 entries, the model's vocabulary another number",
        "vocab",
        [_block(1, 0, 4, 32)],
    ),
    ("logits-with-gap", False, "no block covers position 2", "position", [_block(1, 0, 2), _block(1, 3, 1)]),
    ("logits-that-overlap", False, "two blocks cover position 1", "position", [_block(1, 0, 2), _block(1, 1, 3)]),
    ("logits-too-short", False, "blocks cover 3 of 4 positions", "position", [_block(1, 0, 3)]),
    ("logits-with-nan", False, "a logit at position 2 is NaN", "NaN", [_with_value(NAN)]),
    ("logits-with-inf", False, "a logit at position 2 is +inf", "inf", [_with_value(INF)]),
    ("logits-all-minus-inf", False, "every logit at position 2 is -inf", "inf", [_with_value(-INF, throughout=True)]),
    (
        "logits-of-wrong-byte-length",
        False,
        "data is 3 bytes short of count x V values",
        "bytes",
        [{**(b := _block(1, 0, 4)), "data": b["data"][:-3]}],
    ),
    (
        "logits-in-q16-without-numbers",
        False,
        "data in q16 holds the codes alone: scale, minimum and logsumexp of each row are missing",
        "three float32",
        [_in_q16(least=q16.NUMBERS_BYTES)],
    ),
    (
        "logits-in-q16-of-negative-scale",
        False,
        "the scale of q16 at position 2 is -1",
        "scale",
        [_in_q16(q16.NUMBERS.index("scale"), -1.0)],
    ),
    (
        "logits-in-q16-of-minimum-nan",
        False,
        "the minimum of q16 at position 2 is NaN",
        "minimum",
        [_in_q16(q16.NUMBERS.index("minimum"), NAN)],
    ),
    ("logits-of-unknown-encoding", False, "encoding is `int4`", "int4", [{**_block(1, 0, 4), "encoding": "int4"}]),
]


def _logits_case(folder: Path, name: str, needs_model: bool, what: str, phrase: str, bad_blocks: list[Row]) -> Case:
    (folder / name).mkdir()
    write_rollout_table(folder / name / "rollouts.parquet", as_table([good_row(index) for index in range(3)]))
    blocks = [_block(0, 0, 4), *bad_blocks, _block(2, 0, 4)]
    table = pa.Table.from_pylist(blocks, schema=LOGITS_SCHEMA)
    pq.write_table(table, folder / name / "logits-00000.parquet", compression="none", write_page_checksum=True)
    return Case(name, "rollouts", 11, 1, needs_model, what, phrase)


def _file_cases(folder: Path) -> list[Case]:
    """Faults of whole files and folders."""
    table = as_table([good_row(index) for index in range(3)])
    write_rollout_table(folder / "missing-response-ids.parquet", table.drop_columns(["response_ids"]))
    strings = pa.array([["3", "+", "8", "="]] * 3)
    mistyped = table.set_column(table.schema.get_field_index("prompt_ids"), "prompt_ids", strings)
    write_rollout_table(folder / "prompt-ids-of-strings.parquet", mistyped)
    (folder / "duplicate-id-across-files").mkdir()
    for name in ("rollouts-00000.parquet", "rollouts-00001.parquet"):
        write_rollout_table(folder / "duplicate-id-across-files" / name, table.slice(0, 1))
    future = table.replace_schema_metadata({"trm_audit.kind": "rollouts", "trm_audit.schema_version": "99"})
    pq.write_table(future, folder / "unknown-schema-version.parquet", write_page_checksum=True)
    _damaged_files(folder, table)
    (folder / "empty-folder").mkdir()
    (folder / "empty-folder" / ".gitkeep").touch()
    return [
        _file_case("missing-response-ids.parquet", "the column response_ids is missing", "response_ids"),
        _file_case("prompt-ids-of-strings.parquet", "prompt_ids holds strings", "prompt_ids"),
        _file_case("duplicate-id-across-files", "two files have one rollout_id", "good-0", rule=1),
        _file_case("unknown-schema-version.parquet", "trm_audit.schema_version is 99", "99"),
        _file_case("truncated.parquet", "the file ends in the middle of its data", "truncated.parquet"),
        _file_case(
            "flipped-byte.parquet",
            "one byte of a data page is flipped; its page checksum tells",
            "flipped-byte.parquet",
        ),
        _file_case("not-parquet.parquet", "the file is text", "not-parquet.parquet"),
        _file_case("empty-folder", "the folder holds no shard", "empty-folder"),
    ]


def _file_case(path: str, what: str, phrase: str, rule: int | None = None) -> Case:
    return Case(path, "rollouts", rule, None, False, what, phrase)


def _damaged_files(folder: Path, table: pa.Table) -> None:
    """Truncated, with a flipped byte, and not Parquet at all."""
    path = folder / "flipped-byte.parquet"
    schema = table.replace_schema_metadata({"trm_audit.kind": "rollouts", "trm_audit.schema_version": "1"})
    pq.write_table(schema, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    (folder / "truncated.parquet").write_bytes(content[: len(content) // 2])
    chunk = next(
        column
        for column in map(pq.ParquetFile(path).metadata.row_group(0).column, range(table.num_columns))
        if column.path_in_schema.startswith("response_ids")
    )
    content[chunk.data_page_offset + chunk.total_compressed_size - 4] ^= 1
    path.write_bytes(content)
    (folder / "not-parquet.parquet").write_text("rollout_id,prompt,response\na,3+8=,;11\n")


README_HEAD = """# Bad data, one case per fault

Written by `make_sample_data.py bad`. Every case must fail with exit code 3 and a message that names its place and
contains the words of the last column. Rules are those of `schemas/rollout.md`; rows count from 0. `cases.json` holds
the same table. Cases marked with * show only beside the model `../tiny/model`; those under `models/` are checkpoint
folders for `--model`.

| path | rule | row | what is wrong | message contains |
|---|---|---|---|---|"""


def _readme(cases: list[Case]) -> str:
    lines = [README_HEAD]
    for case in cases:
        star = "*" if case.needs_model and case.kind == "rollouts" else ""
        rule, row = ("" if value is None else value for value in (case.rule, case.row))
        lines.append(f"| `{case.path}`{star} | {rule} | {row} | {case.what} | `{case.phrase}` |")
    return "\n".join(lines) + "\n"
