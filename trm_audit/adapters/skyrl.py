"""SkyRL: what it dumps (`trainer.dump_data_batch`) is pickled objects, which are not opened.

docs/export_snippets.md has the few lines that write a TrainingInputBatch as rollout shards from inside the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trm_audit.adapters.base import Given, Row, Source
from trm_audit.errors import BadInput


def read(path: Path, given: Given) -> Iterator[Row]:
    """Raises BadInput with the reason, whatever the file is."""
    raise BadInput(
        "is what SkyRL pickled; pickles are not opened, because they can run code",
        place=str(path),
        next_step="Write the TrainingInputBatch from inside the trainer: docs/export_snippets.md, section SkyRL.",
    )


SOURCE = Source(
    name="skyrl",
    about="nothing that SkyRL dumps by itself: docs/export_snippets.md writes rollout shards from a TrainingInputBatch",
    suffixes=(".pkl",),
    grade="sampled",
    switch_on="the snippet of docs/export_snippets.md in the trainer, with generator.sampling_params.logprobs=1",
    read=read,
)
