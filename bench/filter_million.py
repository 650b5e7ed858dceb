"""How long filter takes to decide a million sequences from statistics alone, beside copying their files.

python bench/filter_million.py [ROWS]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trm_audit import Criteria, FilterOptions, filter_scores
from trm_audit.shards.write import head

SHARDS = 10


def write_statistics(folder: Path, rows: int) -> None:
    """Score shards of `rows` sequences in all, without a token in them."""
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        n = rows // SHARDS
        largest = rng.lognormal(-4, 1.5, n)
        table = pa.table(
            {
                "rollout_id": [f"{shard}-{row}" for row in range(n)],
                "group_id": [f"{shard}-{row // 16}" for row in range(n)],
                "reward": rng.integers(0, 2, n).astype(np.float64),
                "grade": ["exact"] * n,
                "num_tokens": rng.integers(1, 4096, n).astype(np.int32),
                "seq_max_kl": largest,
                "seq_argmax_kl": rng.integers(0, 4096, n).astype(np.int32),
                "seq_mean_kl": largest / 20,
            }
        )
        metadata = {**head("scores", fingerprint=str(shard), run={"model_hash": "bench"}), b"trm_audit.counts": b"{}"}
        pq.write_table(table.replace_schema_metadata(metadata), folder / f"{shard}.parquet")


def main(rows: int) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        scores = Path(tmp) / "scores"
        scores.mkdir()
        write_statistics(scores, rows)
        began = time.perf_counter()
        for file in sorted(scores.glob("*.parquet")):
            pq.write_table(pq.read_table(file), Path(tmp) / "copy.parquet", compression="zstd")
        copied = time.perf_counter() - began
        began = time.perf_counter()
        options = FilterOptions(Criteria(delta_max=0.05, delta_avg=0.002))
        result = filter_scores([str(scores)], str(Path(tmp) / "train"), options)
        filtered = time.perf_counter() - began
    print(
        f"{result.n_total:,} sequences, {result.n_kept:,} kept: {filtered:.1f} s, "
        f"{filtered / copied:.1f} times a copy of the files"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
