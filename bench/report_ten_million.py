"""How long the HTML report of ten million tokens takes, and how much memory, beside reading the same files.

python -m bench.report_ten_million [TOKENS [MEAN_LENGTH]]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trm_audit.numerics.ragged import Ragged
from trm_audit.rollout import TOKEN_SCORES, RolloutBatch, Sampling, TokenScores
from trm_audit.shards.scores import Counts, score_columns
from trm_audit.shards.write import head

SHARDS, GROUP = 10, 16

Floats = NDArray[np.float64]


def write_scores(folder: Path, tokens: int, mean_length: int) -> None:
    """Score shards of exact grade with about so many tokens in all: 16 rollouts a prompt, five policy versions."""
    for shard in range(SHARDS):
        rng = np.random.default_rng(shard)
        rows = max(GROUP, tokens // SHARDS // mean_length)
        lengths = np.clip(rng.lognormal(np.log(mean_length) - 0.32, 0.8, rows).astype(np.int64), 1, 4096)
        table = one_shard(rng, shard, np.concatenate([[0], np.cumsum(lengths)]))
        counts = Counts()
        counts.add(table)
        metadata = head("scores", fingerprint=str(shard), run={"model_hash": "bench", "dtype": "float32"})
        keys = {**metadata, b"trm_audit.counts": json.dumps(counts.to_json()).encode()}
        pq.write_table(pa.Table.from_batches([table]).replace_schema_metadata(keys), folder / f"{shard}.parquet")


def one_shard(rng: np.random.Generator, shard: int, offsets: NDArray[np.int64]) -> pa.RecordBatch:
    """Scores of rollouts with heavy-tailed divergences that grow with staleness."""
    rows, n = len(offsets) - 1, int(offsets[-1])
    version = rng.integers(0, 5, rows)
    ids = rng.zipf(1.3, n) % 50_000
    rollout = np.minimum(-rng.exponential(0.5, n), 0.0)
    ratio = rng.standard_t(3, n) * np.repeat(0.005 * 2.0 ** (4 - version), np.diff(offsets))
    kl = np.square(ratio) * rng.uniform(0.1, 1.0, n)
    names = [f"{shard}-{row}" for row in range(rows)]
    groups = [f"{shard}-{row // GROUP}" for row in range(rows)]
    columns = pa.RecordBatch.from_pydict(
        {
            "rollout_id": names,
            "group_id": groups,
            "prompt_ids": pa.array([[1, 2, 3]] * rows, pa.list_(pa.int32())),
            "response_ids": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids, pa.int32())),
            "response_mask": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.ones(n, dtype=bool))),
            "rollout_logprobs": pa.ListArray.from_arrays(
                pa.array(offsets, pa.int32()), pa.array(rollout.astype(np.float32))
            ),
            "reward": rng.integers(0, 2, rows).astype(np.float64),
            "policy_version": version,
            "engine": ["vllm"] * rows,
        }
    )
    missing = np.full(n, np.nan)
    values: dict[str, Floats] = dict.fromkeys(TOKEN_SCORES, missing)
    entropy = rng.exponential(0.7, n)
    values |= {"trainer_logprobs": np.minimum(rollout + ratio, 0.0), "log_ratio": ratio}
    values |= {"kl": kl, "kl_reverse": kl, "tv": np.sqrt(kl / 2)}
    values |= {"rollout_entropy": entropy, "trainer_entropy": entropy}
    batch = RolloutBatch(
        shard=str(shard), row_numbers=np.arange(rows), columns=columns, rollout_id=names, group_id=groups,
        prompt=Ragged(np.tile([1, 2, 3], rows), 3 * np.arange(rows + 1)), response=Ragged(ids, offsets),
        response_mask=np.ones(n, dtype=bool), rollout_logprobs=rollout, stored_trainer_logprobs=None, topk=None,
        sampling=[Sampling()] * rows, policy_version=version.astype(np.float64), grade=["exact"] * rows,
    )  # fmt: skip
    scores = TokenScores(values, rollout, np.zeros(rows, dtype=bool), ["sampling"] * rows, np.zeros(rows, np.int64))
    return score_columns(batch, scores, 4, rebuilds=False)


def main(tokens: int, mean_length: int) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        scores, page = Path(tmp) / "scores", Path(tmp) / "report.html"
        scores.mkdir()
        write_scores(scores, tokens, mean_length)
        began = time.perf_counter()
        num_bytes = sum(pq.read_table(file).nbytes for file in sorted(scores.glob("*.parquet")))
        read = time.perf_counter() - began
        command = [str(Path(sys.executable).with_name("trm-audit")), "report", str(scores)]
        command += ["--delta-max", "0.05", "--delta-avg", "0.002", "-o", str(page)]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        size = page.stat().st_size
    print(
        f"{tokens:,} tokens in sequences of {mean_length:,}, {num_bytes / 1e9:.1f} GB of columns: {seconds:.1f} s, "
        f"{seconds / read:.1f} times reading them, {peak:.2f} GB at most; the page has {size / 1e3:.0f} kB"
    )


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*given, *(10_000_000, 400)[len(given) :])
