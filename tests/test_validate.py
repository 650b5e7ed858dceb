"""validate: every rule without a model, every error once, and what breaks no rule but is suspicious."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run
from some_rollouts import Row, as_table, rollout, write_shard

from trm_audit.pipeline.validate import ValidateOptions, ValidateResult, validate
from trm_audit.shards import plausible
from trm_audit.shards.write import StreamSink, head


def checked(folder: Path, *rows: Row, **options: Any) -> ValidateResult:
    write_shard(folder / "a.parquet", rows)
    return validate([str(folder / "a.parquet")], ValidateOptions(**options))


def row(**more: Any) -> Row:
    return {**rollout(0, length=30), "temperature": 1.0, "logprobs_mode": "raw", **more}


def test_a_good_shard_has_no_findings(tmp_path: Path) -> None:
    result = checked(tmp_path, row())
    assert (result.errors, dict(result.warnings)) == ([], {})
    assert (result.shards, result.rows, result.num_tokens, dict(result.grades)) == (1, 1, 30, {"sampled": 1})


def test_all_errors_are_collected(tmp_path: Path) -> None:
    rows = [rollout(i) for i in range(6)]
    rows[1]["prompt_ids"], rows[3]["response_mask"], rows[5]["rollout_logprobs"] = [-1], [True] * 99, None
    result = checked(tmp_path, *rows)
    assert [error.place.split(", ")[1][:5] for error in result.errors] == ["row 1", "row 3", "row 5"]
    assert (result.rows, sum(result.grades.values())) == (6, 3)


def test_duplicates_across_shards_are_found_in_the_second(tmp_path: Path) -> None:
    for name in "ab":
        write_shard(tmp_path / f"{name}.parquet", [rollout(0)])
    (error,) = validate([str(tmp_path)], ValidateOptions()).errors
    assert f"{tmp_path}/b.parquet, row 0" in error.place
    assert f"first in {tmp_path}/a.parquet, row 0" in error.cause


def test_a_shard_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [rollout(0, temperature=-1.0)])
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    write_shard(tmp_path / "c.parquet", [rollout(1, temperature=-1.0)])
    result = validate([str(tmp_path)], ValidateOptions())
    assert sorted(Path(error.place.split(",")[0]).name for error in result.errors) == [
        "a.parquet",
        "b.parquet",
        "c.parquet",
    ]


def test_stored_logits_are_read_unless_told_not_to(tmp_path: Path) -> None:
    bad = rollout(0, "exact", length=100)
    write_shard(tmp_path / "a.parquet", [bad])
    # GIVEN a value that our writer refuses, in a file that another one wrote
    needle = bad["logits"][70].tobytes()
    bad["logits"][70] = np.nan
    table = pq.read_table(tmp_path / "logits-a.parquet")
    data = [value.replace(needle, bad["logits"][70].tobytes()) for value in table["data"].to_pylist()]
    pq.write_table(table.set_column(5, "data", pa.array(data, pa.large_binary())), tmp_path / "logits-a.parquet")
    (error,) = validate([str(tmp_path)], ValidateOptions()).errors
    assert "logits at position 70 contain NaN" in error.cause
    assert error.place == f"{tmp_path}/a.parquet, row 0 (rollout_id=r0000)"
    assert validate([str(tmp_path)], ValidateOptions(read_logits=False)).errors == []


SUSPICIOUS = {
    plausible.ZERO_RUNS: row(rollout_logprobs=[-1.0] * 10 + [0.0] * 9 + [-1.0] * 11),
    plausible.ZERO_TAIL: row(rollout_logprobs=[-1.0] * 21 + [0.0] * 9),
    plausible.RAW_TRUNCATED: row(top_p=0.9),
    plausible.RAW_TEMPERED: row(temperature=0.6),
    plausible.TEMPERED_TRUNCATED: row(top_k=20, logprobs_mode="tempered"),
    plausible.NO_POLICY_TOKENS: row(response_mask=[False] * 30),
    plausible.SEVERAL_VERSIONS: row(policy_version=[1] * 15 + [2] * 15),
    "temperature is not stored: taken as 1": row(temperature=None),
    "logprobs_mode is not stored: taken as raw": row(logprobs_mode=None),
}


@pytest.mark.parametrize("sentence", SUSPICIOUS)
def test_traps_of_real_data_are_pointed_out(tmp_path: Path, sentence: str) -> None:
    result = checked(tmp_path, SUSPICIOUS[sentence], {**row(), "rollout_id": "fine", "policy_version": None})
    assert result.errors == []
    assert result.warnings[sentence] == 1


def test_zeros_of_a_truncating_sampler_are_no_trap(tmp_path: Path) -> None:
    result = checked(tmp_path, row(rollout_logprobs=[0.0] * 30, top_p=0.5, logprobs_mode="processed"))
    assert not any("0.0" in sentence for sentence in result.warnings)


def test_a_stream_is_checked_too(run: Run) -> None:
    out = io.BytesIO()
    sink = StreamSink(out, head("rollouts"))
    for batch in as_table([rollout(0), rollout(1), rollout(2, temperature=0.0)]).to_batches(max_chunksize=1):
        sink.write(batch)
    sink.close({})
    outcome = run("validate", "-", stdin=out.getvalue())
    assert outcome.code == 3
    assert b"-, row 2 (rollout_id=r0002): temperature is 0" in outcome.out
    assert b"3 rollouts in 1 shards" in outcome.out


def test_the_command_says_what_it_saw(run: Run, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [rollout(0), rollout(1, "interval")])
    outcome = run("validate", tmp_path)
    assert outcome.code == 0
    tokens = len(rollout(0)["response_ids"]) + len(rollout(1)["response_ids"])
    assert f"2 rollouts in 1 shards, {tokens} policy tokens: 1 interval, 1 sampled; 0 errors" in outcome.out.decode()


def test_many_errors_are_counted_and_not_all_shown(run: Run, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [rollout(i, temperature=-1.0) for i in range(30)])
    outcome = run("validate", tmp_path)
    assert outcome.out.count(b"Error: ") == 20
    assert b"... and 10 more errors" in outcome.out
    assert b"30 errors" in outcome.out
