"""What went wrong once, end to end: lost output, stale marks, silent mixtures."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run
from models import save, tiny_model
from some_rollouts import rollout, write_shard

from trm_audit.criteria.thresholds import Criteria
from trm_audit.errors import UsageError
from trm_audit.pipeline.filter import FilterOptions, filter_scores
from trm_audit.pipeline.report import ReportOptions, summarize
from trm_audit.pipeline.score import ScoreOptions, score
from trm_audit.shards.write import StreamSink, head


def scored(folder: Path, checkpoint: Path, rows: list[dict[str, object]], **options: object) -> Path:
    write_shard(folder / "rollouts" / "a.parquet", rows)
    score([str(folder / "rollouts")], str(folder / "scores"), ScoreOptions(model=checkpoint, **options))
    return folder / "scores"


def test_overwrite_never_replaces_scores_by_training_shards(sampled_scores: Path, run: Run) -> None:
    before = {file.name: file.read_bytes() for file in (sampled_scores / "data").iterdir()}
    outcome = run("filter", sampled_scores, "--delta-max", "1", "-o", sampled_scores, "--overwrite")
    assert outcome.code == 3
    assert "holds scores" in outcome.err
    assert {file.name: file.read_bytes() for file in (sampled_scores / "data").iterdir()} == before


def test_a_run_that_failed_before_its_first_shard_does_not_claim_the_folder(
    sampled_scores: Path, tmp_path: Path, run: Run
) -> None:
    assert run("filter", sampled_scores, "--keep", "seq_max_nothing<1", "-o", tmp_path / "out").code == 2
    assert run("filter", sampled_scores, "--keep", "seq_max_k2<1", "-o", tmp_path / "out").code == 0


def test_success_goes_when_the_run_has_more_shards_than_it_speaks_of(checkpoint: Path, tmp_path: Path) -> None:
    scores = scored(tmp_path, checkpoint, [rollout(i) for i in range(4)])
    assert (scores / "_SUCCESS").is_file()
    # GIVEN a shard more, and a part that has nothing to do with it
    write_shard(tmp_path / "rollouts" / "b.parquet", [rollout(i) for i in range(10, 14)])
    result = score([str(tmp_path / "rollouts")], str(scores), ScoreOptions(model=checkpoint, part=(1, 2)))
    assert (result.shards, result.done, result.complete) == (0, 1, False)
    assert not (scores / "_SUCCESS").exists()


def test_a_stream_that_begins_with_an_empty_response_is_judged_as_its_files_are(
    checkpoint: Path, tmp_path: Path
) -> None:
    empty = {**rollout(0), "response_ids": [], "rollout_logprobs": []}
    scores = scored(tmp_path, checkpoint, [empty, rollout(1, "interval"), rollout(2)])
    table = pq.read_table(scores / "data" / "a.parquet")
    stream = io.BytesIO()
    sink = StreamSink(stream, head("scores"))
    for row in range(3):
        sink.write(table.slice(row, 1).combine_chunks().to_batches()[0])
    sink.close({})
    options = FilterOptions(Criteria(delta_max=0.5), advantage="none")
    for source in (scores, "-"):
        stream.seek(0)
        with pytest.raises(UsageError, match="several grades"):
            filter_scores([str(source)], io.BytesIO(), options, source=stream)


def test_a_response_without_policy_tokens_has_no_grade_and_counts_in_every_mean(
    checkpoint: Path, tmp_path: Path
) -> None:
    empty = {**rollout(0), "response_ids": [], "rollout_logprobs": []}
    scores = scored(tmp_path, checkpoint, [empty, *(rollout(i, "exact") for i in range(1, 5))])
    summary = summarize([str(scores)], ReportOptions())
    assert summary.counts.grades == {"exact": 4}
    assert summary.bounds["all"]["exact"].rows == summary.counts.n_total == 5


def test_only_half_of_the_top_k_evidence_is_an_error(tmp_path: Path, run: Run) -> None:
    write_shard(
        tmp_path / "a.parquet", [{**rollout(0, "interval"), "rollout_topk_logprobs": None}, rollout(1, "interval")]
    )
    outcome = run("validate", tmp_path)
    assert outcome.code == 3
    assert b"only one of rollout_topk_ids and rollout_topk_logprobs" in outcome.out


def test_skip_bad_leaves_out_the_row_whose_logits_are_not_numbers_and_no_other(
    checkpoint: Path, tmp_path: Path
) -> None:
    # GIVEN four exact rows, one with NaN in its stored logits
    write_shard(tmp_path / "rollouts" / "a.parquet", [rollout(i, "exact") for i in range(4)])
    file = tmp_path / "rollouts" / "logits-a.parquet"
    table = pq.read_table(file)
    name = table.column("rollout_id")[1].as_py()
    data = [
        d if n != name else b"\xff" * len(d)
        for n, d in zip(table["rollout_id"].to_pylist(), table["data"].to_pylist(), strict=True)
    ]
    at = table.schema.get_field_index("data")
    pq.write_table(table.set_column(at, "data", pa.array(data, pa.large_binary())), file)
    result = score(
        [str(tmp_path / "rollouts")], str(tmp_path / "scores"), ScoreOptions(model=checkpoint, skip_bad=True)
    )
    assert (result.rows, result.num_skipped, result.bad_shards) == (3, 1, 0)
    assert name not in pq.read_table(tmp_path / "scores" / "data" / "a.parquet").column("rollout_id").to_pylist()


def test_a_glob_passes_over_side_files(checkpoint: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [rollout(i, "exact") for i in range(2)])
    result = score([str(tmp_path / "*.parquet")], str(tmp_path / "scores"), ScoreOptions(model=checkpoint))
    assert result.grades == {"exact": 2}


def test_a_report_of_kept_rows_alone_says_nothing_of_all(sampled_scores: Path, tmp_path: Path) -> None:
    options = FilterOptions(Criteria(keep="seq_max_k2<0.01"), drop=True)
    result = filter_scores([str(sampled_scores)], str(tmp_path / "train"), options)
    summary = summarize([str(tmp_path / "train")], ReportOptions())
    assert (summary.counts.n_total, summary.n_kept) == (result.n_total, result.n_kept)
    assert summary.reasons == dict(result.reasons)
    assert (summary.violations, summary.acceptance_curves.curves) == (None, {})
    assert "all" not in summary.bounds


def test_a_sequence_beyond_a_table_of_positions_is_bad_input(tmp_path: Path, run: Run) -> None:
    model = save(tiny_model("gpt2", max_position_embeddings=16), tmp_path / "model")
    write_shard(tmp_path / "rollouts" / "a.parquet", [rollout(0, length=40)])
    outcome = run("score", tmp_path / "rollouts", "--model", model, "-o", tmp_path / "scores")
    assert outcome.code == 3
    assert "max_position_embeddings" in outcome.err
