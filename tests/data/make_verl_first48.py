"""Makes verl-first48.parquet: log-ratios of 48 real rollouts and what another trainer's own code keeps of them.

    python make_verl_first48.py FOLDER

FOLDER holds the float64 reference scores of 48 llama.cpp rollouts of SmolLM2-135M-Instruct
(reference-float32-first48.parquet) and the masks that verl's rollout correction gave on them (verl-first48.json).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TARGET = Path(__file__).with_name("verl-first48.parquet")


def table_of(folder: Path) -> pa.Table:
    """One row per rollout: rollout_id, log_ratio (list<double>, nats), and a bool column for each of verl's options."""
    scores = pq.read_table(folder / "reference-float32-first48.parquet", columns=["rollout_id", "log_ratio"])
    verl = json.loads((folder / "verl-first48.json").read_text())
    run = verl["base-fp32"]
    if scores["rollout_id"].to_pylist() != run["ids"]:
        raise SystemExit(f"{folder}: the scores and the masks are not of the same rollouts in the same order")
    for option, keep in run["keep"].items():
        scores = scores.append_column(option, pa.array(keep, pa.bool_()))
    return scores.replace_schema_metadata({"source": verl["source"]})


if __name__ == "__main__":
    pq.write_table(table_of(Path(sys.argv[1])), TARGET, compression="zstd")
