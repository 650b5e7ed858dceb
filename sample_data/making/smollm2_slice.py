"""The folder `smollm2/`: rollouts that llama.cpp sampled from SmolLM2-135M-Instruct, with their float64 reference.

`top20/` holds whole groups with top-20 evidence, `full/` one short response with every logit in float16. What the
source stores is copied, never computed anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from trm_audit.shards.rollout_writer import write_rollout_table

TOP20_GROUPS = ("math-08", "math-03", "math-05", "code-04")
FULL_ROLLOUTS = ("reason-04/s1",)
REFERENCE_COLUMNS = (
    "rollout_id",
    "num_tokens",
    "trainer_logprobs",
    "log_ratio",
    "kl",
    "kl_reverse",
    "tv",
    "seq_max_kl",
)


def make(source: Path, folder: Path) -> None:
    """Write `top20/` and `full/` of `folder` from a source folder with `llamacpp-top20/` and `llamacpp-full/`."""
    top20, full = source / "llamacpp-top20", source / "llamacpp-full"
    rollouts = pq.read_table(top20 / "rollouts.parquet")
    _write(folder / "top20", rollouts.filter(pc.is_in(rollouts["group_id"], pa.array(TOP20_GROUPS))))
    _write_reference(folder / "top20", pq.read_table(top20 / "reference-float32-first48.parquet"))
    rollouts = pq.read_table(full / "rollouts.parquet")
    rows = rollouts.filter(pc.is_in(rollouts["rollout_id"], pa.array(FULL_ROLLOUTS)))
    _write(folder / "full", rows, logits=["logits-00000.safetensors"])
    _write_reference(folder / "full", pq.read_table(full / "reference-float32.parquet"))
    save_file(_stored_logits(full), folder / "full" / "logits-00000.safetensors")


def _write(folder: Path, table: pa.Table, logits: list[str] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_rollout_table(folder / "rollouts.parquet", table.replace_schema_metadata(None), logits=logits or [])


def _write_reference(folder: Path, reference: pa.Table) -> None:
    """The reference's columns of the folder's rows, in their order."""
    wanted = pq.read_table(folder / "rollouts.parquet", columns=["rollout_id"])["rollout_id"]
    rows = pc.index_in(wanted, reference["rollout_id"])
    if rows.null_count:
        raise ValueError(f"{folder}: {rows.null_count} rollouts have no reference")
    table = reference.take(rows).select(REFERENCE_COLUMNS).replace_schema_metadata(None)
    pq.write_table(table, folder / "reference.parquet", compression="zstd", write_page_checksum=True)


def _stored_logits(full: Path) -> dict[str, NDArray[np.float16]]:
    """rollout_id -> [T, V] float16 of `FULL_ROLLOUTS`."""
    found: dict[str, NDArray[np.float16]] = {}
    for path in sorted(full.glob("logits-*.safetensors")):
        with safe_open(path, "numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name in FULL_ROLLOUTS}  # noqa: SIM118
    return found
