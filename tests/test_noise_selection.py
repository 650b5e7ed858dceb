"""The noise of the precision is measured on the same rollouts whatever part of a run is at work, and stands with it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from some_rollouts import rollout, write_shard, write_shards

from trm_audit.errors import RowError
from trm_audit.pipeline.noise import FEW, measure_noise
from trm_audit.pipeline.progress import Silent
from trm_audit.pipeline.score import ScoreOptions, chosen_shards, score
from trm_audit.pipeline.selection import select
from trm_audit.pipeline.trainer import Trainer
from trm_audit.shards.read import find_shards


class Listens(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def floors(folder: Path) -> list[dict[str, object] | None]:
    """Noise floors in the footers of a score folder."""
    footers = [pq.read_metadata(file).metadata for file in sorted((folder / "data").iterdir())]
    return [json.loads(footer[b"trm_audit.run"])["noise_floor"] for footer in footers]


def measured_on(rollouts: Path, options: ScoreOptions) -> int:
    """Rollouts that a run of these settings measures on, 0 for none."""
    trainer = Trainer(options)
    shards = find_shards([str(rollouts)], "rollouts").shards
    selection = select(shards, {}, options.sample, options.limit)
    measure_noise(trainer, chosen_shards(shards, selection, options), selection)
    return 0 if trainer.noise is None else int(str(trainer.noise["num_rollouts"]))


def test_every_run_below_float32_measures_on_its_first_rollouts_whatever_is_left_to_do(
    checkpoint: Path, tmp_path: Path
) -> None:
    # GIVEN three shards, the first of three rows, scored in two parts, in bfloat16
    write_shard(tmp_path / "rollouts" / "part-0.parquet", [rollout(i, length=6) for i in range(3)])
    for k in (1, 2):
        write_shard(tmp_path / "rollouts" / f"part-{k}.parquet", [rollout(9 * k + i, length=6) for i in range(9)])
    watch = Listens()
    for part in ((1, 2), (2, 2)):
        options = ScoreOptions(model=checkpoint, dtype="bfloat16", part=part)
        score([str(tmp_path / "rollouts")], str(tmp_path / "out"), options, progress=watch)
    # WHEN a shard is lost and the run goes on
    (tmp_path / "out" / "data" / "part-2.parquet").unlink()
    assert score([str(tmp_path / "rollouts")], str(tmp_path / "out"), options).complete is False
    again = ScoreOptions(model=checkpoint, dtype="bfloat16", part=(1, 2))
    assert score([str(tmp_path / "rollouts")], str(tmp_path / "out"), again).shards == 1
    # THEN all of it carries the same figures, from the first rows of the first two shards, and says them once a call
    found = floors(tmp_path / "out")
    assert found[0] == found[1] == found[2] != None  # noqa: E711
    assert found[0]["num_rollouts"] == 11
    assert found[0]["num_tokens"] == 66
    said = [note for note in watch.notes if note.startswith("noise floor of bfloat16 on 11 rollouts (66 tokens)")]
    assert len(said) == 2


def test_a_share_is_a_share_of_the_groups_that_the_run_takes(checkpoint: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "rollouts", 2, 80, length=2)

    def settings(noise_floor: float | None, **more: object) -> ScoreOptions:
        return ScoreOptions(model=checkpoint, dtype="bfloat16", noise_floor=noise_floor, **more)  # type: ignore[arg-type]

    whole, half = measured_on(tmp_path / "rollouts", settings(1.0)), measured_on(tmp_path / "rollouts", settings(0.5))
    assert whole == 160
    assert 40 < half < 120
    assert half % 4 == 0  # groups stay whole
    # of a sample of the groups, a share again: by one hash, so that it is a part of the sample and not all of it
    sampled = measured_on(tmp_path / "rollouts", settings(1.0, sample=0.5))
    both = measured_on(tmp_path / "rollouts", settings(0.5, sample=0.5))
    assert sampled == half
    assert 0 < both < half
    assert measured_on(tmp_path / "rollouts", settings(1.0, limit=7)) == 7


def test_where_there_is_no_noise_or_none_is_wanted_nothing_is_measured(checkpoint: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "rollouts", 1, 2 * FEW, length=3)
    for options, rows in (
        (ScoreOptions(model=checkpoint, dtype="float32"), 0),
        (ScoreOptions(model=checkpoint, dtype="bfloat16", noise_floor=0.0), 0),
        (ScoreOptions(model=checkpoint, dtype="bfloat16"), FEW),
    ):
        assert measured_on(tmp_path / "rollouts", options) == rows


def test_bad_rows_and_damaged_shards_are_left_to_the_run_to_report(checkpoint: Path, tmp_path: Path) -> None:
    # GIVEN a bad row among the first, and rows without policy tokens
    rows = [rollout(0), rollout(1, temperature=-1.0), rollout(2, length=0), *(rollout(i) for i in range(3, 20))]
    write_shard(tmp_path / "rollouts" / "a.parquet", rows)
    options = ScoreOptions(model=checkpoint, dtype="bfloat16")
    # THEN the noise is measured without them, and the run fails as it would have
    assert FEW <= measured_on(tmp_path / "rollouts", options) < 2 * FEW
    with pytest.raises(RowError, match="temperature"):
        score([str(tmp_path / "rollouts")], str(tmp_path / "out"), options)


def test_a_stream_measures_on_its_first_batch_and_says_it_before_its_rows(checkpoint: Path, tmp_path: Path) -> None:
    # GIVEN rollouts as a stream of two batches
    write_shards(tmp_path / "rollouts", 2, 5)
    tables = [pq.read_table(file) for file in sorted((tmp_path / "rollouts").iterdir())]
    source, output = io.BytesIO(), io.BytesIO()
    with pa.ipc.new_stream(source, tables[0].schema.with_metadata({"trm_audit.kind": "rollouts"})) as writer:
        for table in tables:
            writer.write_table(table)
        empty = pa.RecordBatch.from_pylist([], schema=tables[0].schema)
        writer.write_batch(empty, custom_metadata={"trm_audit.last": "true", "trm_audit.total_rows": "10"})
    # WHEN it is scored as a stream
    source.seek(0)
    options = ScoreOptions(model=checkpoint, dtype="bfloat16")
    result = score(["-"], output, options, source=source)
    # THEN all rows are there, and the figures of the first five stand in the schema
    assert result.rows == 10
    reader = pa.ipc.open_stream(output.getvalue())
    found = json.loads(reader.schema.metadata[b"trm_audit.run"])["noise_floor"]
    assert found["num_rollouts"] == 5
    assert reader.read_all().num_rows == 10
