"""verl: what it dumps is text (`trainer.rollout_data_dir`) or pickled objects (DataProto), and neither is read.

docs/export_snippets.md has the few lines that write a DataProto as rollout shards from inside the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trm_audit.adapters.base import Given, Row, Source
from trm_audit.adapters.trainer_rows import TEXT, json_lines, text_only
from trm_audit.errors import BadInput

SNIPPET = "Write the DataProto from inside the trainer: docs/export_snippets.md, section verl."


def read(path: Path, given: Given) -> Iterator[Row]:
    """Raises BadInput with the reason, whatever the file is."""
    if path.suffix == ".jsonl":
        for place, line in json_lines(path):
            raise text_only(place, TEXT & set(line) or set(line), SNIPPET)
    raise BadInput(
        "is pickled objects, or nothing that verl dumps; pickles are not opened, because they can run code",
        place=str(path),
        next_step=SNIPPET,
    )


SOURCE = Source(
    name="verl",
    about="nothing that verl dumps by itself: docs/export_snippets.md writes rollout shards from a DataProto",
    suffixes=(".jsonl", ".pt", ".pkl"),
    grade="sampled",
    switch_on="actor_rollout_ref.rollout.calculate_log_probs=True, and docs/export_snippets.md in the trainer",
    read=read,
)
