"""TRL: its completions (`log_completions`, Parquet) are text, which cannot be audited; `rollout_func` has the ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trm_audit.adapters.base import Given, Row, Source
from trm_audit.adapters.trainer_rows import TEXT, json_lines, text_only
from trm_audit.errors import BadInput

RECORD = (
    "Record in TRL's rollout_func, which has prompt_ids, completion_ids and logprobs at hand: RolloutWriter.add of "
    "trm_audit.record takes them, and with a recorder of the engine evidence of the whole distribution."
)


def read(path: Path, given: Given) -> Iterator[Row]:
    """Raises BadInput with the reason, whatever the file is."""
    if path.suffix == ".jsonl":
        place, fields = next(((place, set(line)) for place, line in json_lines(path)), (str(path), set[str]()))
    else:
        try:
            place, fields = str(path), set(pq.read_schema(path).names)
        except (pa.ArrowException, OSError) as error:
            raise BadInput(f"cannot be read as Parquet: {error}", place=str(path)) from error
    if TEXT & fields:
        raise text_only(place, TEXT & fields, RECORD)
    raise BadInput("is not a file of completions", place=place, next_step=RECORD)


SOURCE = Source(
    name="trl",
    about="nothing that TRL dumps: its completions are text, and trm_audit.record writes rollouts in a rollout_func",
    suffixes=(".parquet", ".jsonl"),
    grade="sketch",
    switch_on="a rollout_func with a recorder of trm_audit.record in it",
    read=read,
)
