"""What flows through pipes equals what lies in files, and a stream that was cut or damaged is noticed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run
from some_rollouts import as_table, rollout, write_shard

from trm_audit.errors import BadInput
from trm_audit.shards.read import LAST, TOTAL_ROWS, open_stream
from trm_audit.shards.write import StreamSink, head

DELTA = ("--delta-max", "0.05")


def table_of(stream: bytes) -> pa.Table:
    return pa.ipc.open_stream(stream).read_all().replace_schema_metadata()


def table_in(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted((folder / "data").glob("*.parquet"))])


def trailer_of(stream: bytes) -> dict[bytes, bytes]:
    reader = pa.ipc.open_stream(stream)
    last: dict[bytes, bytes] = {}
    while True:
        try:
            _, custom = reader.read_next_batch_with_custom_metadata()
        except StopIteration:
            return last
        last = dict(custom or {})


def stream_of(batches: list[pa.RecordBatch], kind: str = "scores", **metadata: object) -> bytes:
    out = io.BytesIO()
    sink = StreamSink(out, head(kind, **metadata))
    for batch in batches:
        sink.write(batch)
    sink.close({})
    return out.getvalue()


@pytest.fixture(scope="module")
def scores(sampled_scores: Path) -> bytes:
    """A stream of score batches, one for each shard of a folder."""
    return stream_of([pq.read_table(file).to_batches()[0] for file in sorted((sampled_scores / "data").iterdir())])


def test_scores_in_a_pipe_equal_scores_in_files(run: Run, rollouts: Path, tmp_path: Path) -> None:
    into_files = run("score", rollouts, "--trainer-logprobs", "stored", "-o", tmp_path / "scores")
    into_pipe = run("score", rollouts, "--trainer-logprobs", "stored", "-o", "-")
    assert (into_files.code, into_pipe.code) == (0, 0)
    assert table_of(into_pipe.out).equals(table_in(tmp_path / "scores"))


def test_a_pipe_of_score_filter_report_equals_the_files(run: Run, exact_scores: Path, tmp_path: Path) -> None:
    # GIVEN the same scores as files and as a stream
    run_json = json.loads((exact_scores / "run.json").read_text())
    stream = stream_of(table_in(exact_scores).to_batches(), run=run_json)
    # WHEN both are filtered and reported
    run("filter", exact_scores, *DELTA, "-o", tmp_path / "train")
    piped = run("filter", "-", *DELTA, "-o", "-", stdin=stream)
    reports = [run("report", exact_scores, *DELTA, "--json"), run("report", "-", *DELTA, "--json", stdin=stream)]
    # THEN every column and number is the same
    assert table_of(piped.out).equals(table_in(tmp_path / "train"))
    assert [report.code for report in reports] == [0, 0]
    assert json.loads(reports[0].out) == json.loads(reports[1].out)


def test_a_stream_of_training_shards_can_be_reported(run: Run, exact_scores: Path, tmp_path: Path) -> None:
    run("filter", exact_scores, *DELTA, "--drop", "-o", tmp_path / "train")
    piped = run("filter", exact_scores, *DELTA, "--drop", "-o", "-")
    reports = [run("report", tmp_path / "train", "--json"), run("report", "-", "--json", stdin=piped.out)]
    assert [report.code for report in reports] == [0, 0]
    assert json.loads(reports[0].out) == json.loads(reports[1].out)
    assert json.loads(reports[1].out)["counts"]["num_dropped"] > 0


def test_rollouts_can_be_piped_into_score(run: Run, rollouts: Path) -> None:
    tables = [pq.read_table(file) for file in sorted(rollouts.iterdir())]
    stream = stream_of([batch for table in tables for batch in table.to_batches()], "rollouts")
    piped = run("score", "-", "--trainer-logprobs", "stored", "-o", "-", stdin=stream)
    files = run("score", rollouts, "--trainer-logprobs", "stored", "-o", "-")
    assert piped.code == 0
    assert table_of(piped.out).equals(table_of(files.out))


def test_a_name_that_comes_twice_in_a_stream_is_noticed(run: Run, tmp_path: Path) -> None:
    rows = [{**rollout(i), "trainer_logprobs": rollout(i)["rollout_logprobs"]} for i in (0, 1, 0)]
    stream = stream_of(as_table(rows).to_batches(max_chunksize=2), "rollouts")
    outcome = run("score", "-", "--trainer-logprobs", "stored", "-o", "-", stdin=stream)
    assert outcome.code == 3
    assert "-, row 2 (rollout_id=r0000): rollout_id occurs again" in outcome.err


def test_the_trailer_carries_rows_and_counts(run: Run, exact_scores: Path) -> None:
    piped = run("filter", exact_scores, *DELTA, "-o", "-")
    trailer = trailer_of(piped.out)
    kept = table_of(piped.out)["keep"].to_pylist()
    assert trailer[LAST] == b"true"
    assert trailer[TOTAL_ROWS] == b"24"
    counts = json.loads(trailer[b"trm_audit.counts"])
    assert (counts["n_total"], counts["n_kept"]) == (24, sum(kept))


def test_with_drop_the_trailer_still_says_how_many_there_were(run: Run, exact_scores: Path) -> None:
    piped = run("filter", exact_scores, *DELTA, "--drop", "-o", "-")
    trailer = trailer_of(piped.out)
    counts = json.loads(trailer[b"trm_audit.counts"])
    assert counts["n_total"] == 24
    assert counts["n_kept"] == int(trailer[TOTAL_ROWS]) == table_of(piped.out).num_rows < 24


def test_stream_metadata_says_what_a_footer_says(run: Run, exact_scores: Path) -> None:
    piped = run("filter", exact_scores, *DELTA, "-o", "-")
    metadata = pa.ipc.open_stream(piped.out).schema.metadata
    assert metadata[b"trm_audit.kind"] == b"training"
    assert json.loads(metadata[b"trm_audit.filter"])["criteria"]["delta_max"] == 0.05
    assert "model_hash" in json.loads(metadata[b"trm_audit.run"])


def test_five_lines_of_pyarrow_read_a_stream(run: Run, exact_scores: Path) -> None:
    piped = run("filter", exact_scores, *DELTA, "-o", "-")
    reader = """
import sys, pyarrow as pa
stream = pa.ipc.open_stream(sys.stdin.buffer)
for batch in stream:
    for row in batch.select(["rollout_id", "keep", "advantage"]).to_pylist():
        print(row["rollout_id"], row["keep"])
"""
    found = subprocess.run([sys.executable, "-c", reader], input=piped.out, capture_output=True, check=True)
    table = table_of(piped.out)
    expected = [f"{n} {k}" for n, k in zip(table["rollout_id"].to_pylist(), table["keep"].to_pylist(), strict=True)]
    assert found.stdout.decode().splitlines() == expected


def cuts_at_batch_boundaries(stream: bytes) -> list[bytes]:
    """The stream as it would be if the writer had died after each of its batches, end mark and all."""
    batches = list(pa.ipc.open_stream(stream))
    cuts = []
    for count in range(len(batches)):
        out = io.BytesIO()
        with pa.ipc.new_stream(out, batches[0].schema) as writer:
            for batch in batches[:count]:
                writer.write_batch(batch)
        cuts.append(out.getvalue())
    return cuts


def test_a_stream_cut_at_a_batch_boundary_is_an_error(run: Run, scores: bytes) -> None:
    cuts = cuts_at_batch_boundaries(scores)
    assert len(cuts) == 4
    for cut in cuts:
        assert pa.ipc.open_stream(cut).read_all().num_rows in (0, 8, 16, 24)  # pyarrow alone sees nothing wrong
        for command in (("filter", "-", "--delta-max", "1", "-o", "-"), ("report", "-")):
            outcome = run(*command, stdin=cut)
            assert outcome.code == 3
            assert "without its trailer: it was cut" in outcome.err


def test_a_stream_cut_anywhere_is_an_error(run: Run, scores: bytes) -> None:
    for length in range(0, len(scores) - 16, len(scores) // 40):
        outcome = run("report", "-", "--json", stdin=scores[:length])
        assert outcome.code == 3, length
        assert outcome.out == b""


def test_a_trailer_that_counts_other_rows_is_an_error(scores: bytes) -> None:
    batches = list(pa.ipc.open_stream(scores))
    out = io.BytesIO()
    with pa.ipc.new_stream(out, batches[0].schema) as writer:
        writer.write_batch(batches[0], custom_metadata={LAST: b"true", TOTAL_ROWS: b"9"})
    with pytest.raises(BadInput, match="had 8 rows, its trailer says 9"):
        list(open_stream(io.BytesIO(out.getvalue()), "scores"))


def test_damaged_bytes_are_an_error_and_never_a_crash(scores: bytes) -> None:
    # GIVEN streams with a few bytes overwritten at random, WHEN they are read
    rng = np.random.default_rng(0)
    noticed = 0
    for _ in range(300):
        damaged = bytearray(scores)
        for at in rng.integers(0, len(damaged), 4):
            damaged[at] = rng.integers(0, 256)
        try:
            for batch in open_stream(io.BytesIO(bytes(damaged)), "scores"):
                batch.to_pylist()
        except BadInput:
            noticed += 1
    # THEN what shows is a BadInput (values inside a buffer may change unseen: a pipe has no checksum)
    assert noticed > 100


def test_offsets_that_point_outside_are_refused() -> None:
    # GIVEN a stream whose list offsets exceed its values: pyarrow alone would read memory that is not there
    lists = pa.array([np.zeros(12345, np.float32)])
    stream = stream_of([pa.RecordBatch.from_arrays([lists], names=["kl"])])
    offsets = np.array([0, 12345], np.int32).tobytes()
    body = stream.rindex(offsets)
    damaged = stream[:body] + np.array([0, 1 << 28], np.int32).tobytes() + stream[body + len(offsets) :]
    with pytest.raises(BadInput, match="damaged after 0 rows"):
        list(open_stream(io.BytesIO(damaged), "scores"))


@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        (b"", "not an Arrow IPC stream"),
        (b"rollout_id,keep\na,True\n", "not an Arrow IPC stream"),
        (stream_of([as_table([rollout(0)]).to_batches()[0]], "rollouts"), "a stream of rollouts, scores"),
    ],
    ids=["nothing", "text", "rollouts"],
)
def test_what_is_no_stream_of_scores_is_refused(run: Run, stdin: bytes, said: str) -> None:
    outcome = run("filter", "-", "--delta-max", "1", "-o", "-", stdin=stdin)
    assert outcome.code == 3
    assert said in outcome.err
    assert outcome.out == b""


def test_a_stream_of_an_unknown_version_is_refused(run: Run) -> None:
    out = io.BytesIO()
    sink = StreamSink(out, {**head("scores"), b"trm_audit.schema_version": b"2"})
    sink.close({})
    outcome = run("report", "-", stdin=out.getvalue())
    assert outcome.code == 3
    assert "schema version '2' is not known" in outcome.err


def test_a_stream_without_rows_keeps_its_columns(run: Run, scores: bytes, tmp_path: Path) -> None:
    empty = stream_of([batch.slice(0, 0) for batch in list(pa.ipc.open_stream(scores))[:1]])
    piped = run("filter", "-", "--delta-max", "1", "-o", "-", stdin=empty)
    filed = run("filter", "-", "--delta-max", "1", "-o", tmp_path / "train", stdin=empty)
    assert (piped.code, filed.code) == (0, 0)
    for table in (table_of(piped.out), pq.read_table(tmp_path / "train" / "data" / "stream.parquet")):
        assert table.num_rows == 0
        assert {"rollout_id", "keep", "loss_mask", "advantage"} <= set(table.column_names)


def test_shards_whose_columns_differ_do_not_fit_one_stream(run: Run, tmp_path: Path) -> None:
    for k, more in enumerate(({"note": "text"}, {"note": 3})):
        row = rollout(k, **more)
        write_shard(tmp_path / f"part-{k}.parquet", [{**row, "trainer_logprobs": row["rollout_logprobs"]}])
    outcome = run("score", tmp_path, "--trainer-logprobs", "stored", "-o", "-")
    assert outcome.code == 3
    assert "note" in outcome.err


@pytest.mark.parametrize("flag", [("--limit", "3"), ("--sample", "50%"), ("--part", "1/2")])
def test_a_stream_cannot_be_divided(run: Run, flag: tuple[str, str]) -> None:
    stream = stream_of(as_table([rollout(0)]).to_batches(), "rollouts")
    outcome = run("score", "-", "--trainer-logprobs", "stored", "-o", "-", *flag, stdin=stream)
    assert outcome.code == 2
    assert "--limit, --sample and --part need files" in outcome.err


def test_a_stream_and_files_cannot_be_mixed(run: Run, sampled_scores: Path) -> None:
    outcome = run("report", "-", sampled_scores)
    assert outcome.code == 2
    assert "- cannot be mixed with files" in outcome.err
