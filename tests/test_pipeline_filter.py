"""What filter writes is what a trainer reads: masks, reasons, advantages, counts, with any reader of Parquet."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Run
from some_rollouts import rollout, write_shard

from trm_audit.criteria.thresholds import Criteria, Undecided
from trm_audit.errors import BadInput, UsageError
from trm_audit.pipeline.filter import FilterOptions, filter_scores
from trm_audit.pipeline.score import ScoreOptions, score
from trm_audit.record import Recipe, evidence
from trm_audit.shards.sketches import sketch_columns
from trm_audit.shards.training import FIRST
from trm_audit.shards.write import StreamSink, head

Rows = list[dict[str, Any]]
MEDIAN = 0.06  # between the seq_max_kl of the fixture's rows: some are kept, some are not


def rows_of(folder: Path) -> Rows:
    return [row for file in sorted((folder / "data").iterdir()) for row in pq.read_table(file).to_pylist()]


def filtered(scores: Path, output: Path, **options: Any) -> Rows:
    criteria = Criteria(delta_max=options.pop("delta_max", MEDIAN))
    filter_scores([str(scores)], str(output), FilterOptions(criteria, **options))
    return rows_of(output)


@pytest.fixture(scope="module")
def train(exact_scores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "train"
    filtered(exact_scores, folder)
    return folder


def test_the_verdict_is_the_comparison_and_the_loss_mask_repeats_it(exact_scores: Path, train: Path) -> None:
    scores, rows = rows_of(exact_scores), rows_of(train)
    assert [row["rollout_id"] for row in rows] == [row["rollout_id"] for row in scores]
    assert 0 < sum(row["keep"] for row in rows) < len(rows) - 1
    for row, known in zip(rows, scores, strict=True):
        largest = max((kl for kl in known["kl"] or [] if kl is not None), default=None)
        assert row["keep"] == (largest is not None and largest <= MEDIAN)
        assert row["response_mask"] == known["response_mask"]
        assert row["loss_mask"] == [own and row["keep"] for own in row["response_mask"]]


def test_a_rejected_row_says_why_and_where(exact_scores: Path, train: Path) -> None:
    for row, known in zip(rows_of(train), rows_of(exact_scores), strict=True):
        if row["keep"]:
            assert row["reason"] is None
        elif row["num_tokens"]:
            value, position = known["seq_max_kl"], known["kl"].index(max(v for v in known["kl"] if v is not None))
            assert row["reason"].startswith("seq_max_kl_above_delta_max(value=")
            assert f"position={position}, delta=0.06" in row["reason"]
            assert float(row["reason"].split("value=")[1].split(",")[0]) == pytest.approx(value, rel=1e-3)


def test_a_row_without_policy_tokens_keeps_its_place_and_counts(train: Path) -> None:
    row = rows_of(train)[5]
    assert (row["rollout_id"], row["keep"], row["reason"], row["num_tokens"]) == (
        "r0005",
        False,
        "no_policy_tokens",
        0,
    )
    assert not any(row["loss_mask"])
    success = json.loads((train / "_SUCCESS").read_text())
    assert success["n_total"] == 24
    assert success["reasons"]["no_policy_tokens"] == 1


def test_log_probabilities_outside_the_mask_are_zero_and_those_inside_untouched(
    exact_scores: Path, train: Path
) -> None:
    seen = 0
    for row, known in zip(rows_of(train), rows_of(exact_scores), strict=True):
        for name in ("rollout_logprobs", "trainer_logprobs", "log_ratio"):
            if row[name] is None:
                assert row["num_tokens"] == 0
                continue
            for value, before, own in zip(row[name], known[name], row["response_mask"], strict=True):
                assert value == (before if own else 0.0)
                seen += not own
    assert seen > 4


def test_a_product_with_the_loss_mask_is_finite(train: Path) -> None:
    for row in rows_of(train):
        for name in ("trainer_logprobs", "rollout_logprobs", "log_ratio"):
            if row[name] is not None:
                assert np.isfinite(np.array(row[name], dtype=np.float64) * np.array(row["loss_mask"])).all()


def test_columns_come_in_the_order_of_the_schema_and_those_of_the_user_follow(train: Path) -> None:
    names = pq.read_schema(train / "data" / "part-0.parquet").names
    first = [name for name in FIRST if name in names]
    assert names[: len(first)] == first
    assert set(FIRST) - set(names) == {"policy_version"}
    assert "note" in names
    assert [row["note"] for row in rows_of(train)] == [f"note {i}" for i in range(24)]
    assert not {"kl", "tv", "trainer_entropy"} & set(names)  # per-token scores stay in the score shard


def group_means(rows: Rows) -> dict[object, float]:
    rewards: dict[object, list[float]] = {}
    for row in rows:
        if row["reward"] is not None:
            rewards.setdefault(row.get("group_id"), []).append(row["reward"])
    return {group: sum(values) / len(values) for group, values in rewards.items()}


def test_advantage_is_reward_minus_the_mean_of_its_group(train: Path) -> None:
    rows = rows_of(train)
    means = group_means(rows)
    assert len(means) == 6
    for row in rows:
        assert row["advantage"] == pytest.approx(row["reward"] - means[row["group_id"]])


def stored_scores(folder: Path, shards: list[Rows]) -> Path:
    """A score folder of rows whose trainer values are near, so that a wide threshold keeps them all."""
    for k, rows in enumerate(shards):
        with_trainer = [{**row, "trainer_logprobs": [v - 0.01 for v in row["rollout_logprobs"]]} for row in rows]
        write_shard(folder / "rollouts" / f"part-{k}.parquet", with_trainer)
    score([str(folder / "rollouts")], str(folder / "scores"), ScoreOptions(trainer_logprobs="stored"))
    return folder / "scores"


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def test_groups_may_be_spread_over_shards(tmp_path: Path) -> None:
    # GIVEN one group of which every shard holds a row
    rows = [rollout(i, group_id=f"g{i % 2}", reward=float(i)) for i in range(6)]
    scores = stored_scores(tmp_path, [rows[:2], rows[2:4], rows[4:]])
    # THEN files are read twice: the means are those of whole groups, 2 and 3
    assert [row["advantage"] for row in filtered(scores, tmp_path / "out")] == [-2, -2, 0, 0, 2, 2]


def test_without_groups_the_baseline_is_the_mean_of_the_data_set(tmp_path: Path) -> None:
    rows = [without(rollout(i, reward=float(i)), "group_id") for i in range(4)]
    scores = stored_scores(tmp_path, [rows[:2], rows[2:]])
    assert [row["advantage"] for row in filtered(scores, tmp_path / "out")] == [-1.5, -0.5, 0.5, 1.5]


def test_a_row_without_reward_has_no_advantage_and_no_part_in_the_mean(tmp_path: Path) -> None:
    rewards = [1.0, None, 3.0]
    rows = [rollout(i, group_id="g", reward=reward) for i, reward in enumerate(rewards)]
    scores = stored_scores(tmp_path, [rows])
    assert [row["advantage"] for row in filtered(scores, tmp_path / "out")] == [-1.0, None, 1.0]


def test_a_stored_advantage_is_left_as_it_is(tmp_path: Path) -> None:
    scores = stored_scores(tmp_path, [[rollout(i, advantage=10.0 + i) for i in range(3)]])
    assert [row["advantage"] for row in filtered(scores, tmp_path / "out")] == [10.0, 11.0, 12.0]


def test_advantage_none_fills_nothing(tmp_path: Path) -> None:
    scores = stored_scores(tmp_path, [[rollout(i) for i in range(3)]])
    assert "advantage" not in filtered(scores, tmp_path / "out", advantage="none")[0]


def stream_in_batches(scores: Path, sizes: list[int]) -> bytes:
    table = pa.concat_tables([pq.read_table(file) for file in sorted((scores / "data").iterdir())])
    out, at = io.BytesIO(), 0
    sink = StreamSink(out, head("scores"))
    for size in sizes:
        sink.write(table.slice(at, size).combine_chunks().to_batches()[0])
        at += size
    assert at == table.num_rows
    sink.close({})
    return out.getvalue()


@pytest.mark.parametrize("sizes", [[24], [1] * 24, [3, 6, 1, 9, 5], [4] * 6])
def test_in_a_pipe_groups_are_put_together_however_the_batches_fall(
    run: Run, exact_scores: Path, train: Path, sizes: list[int]
) -> None:
    stream = stream_in_batches(exact_scores, sizes)
    outcome = run("filter", "-", "--delta-max", str(MEDIAN), "-o", "-", stdin=stream)
    assert outcome.code == 0
    assert pa.ipc.open_stream(outcome.out).read_all().to_pylist() == rows_of(train)


@pytest.mark.parametrize("sizes", [[4], [1] * 4], ids=["one batch", "row by row"])
def test_groups_that_are_not_contiguous_are_refused_in_a_pipe(run: Run, tmp_path: Path, sizes: list[int]) -> None:
    scores = stored_scores(tmp_path, [[rollout(i, group_id=f"g{i % 2}") for i in range(4)]])
    stream = stream_in_batches(scores, sizes)
    refused = run("filter", "-", "--delta-max", "1", "-o", "-", stdin=stream)
    assert refused.code == 2
    assert "group 'g0' comes back after other groups" in refused.err
    assert "--advantage none" in refused.err
    assert run("filter", "-", "--delta-max", "1", "--advantage", "none", "-o", "-", stdin=stream).code == 0


def test_without_groups_a_pipe_cannot_fill_advantages(run: Run, tmp_path: Path) -> None:
    scores = stored_scores(tmp_path, [[without(rollout(i), "group_id") for i in range(4)]])
    stream = stream_in_batches(scores, [4])
    refused = run("filter", "-", "--delta-max", "1", "-o", "-", stdin=stream)
    assert refused.code == 2
    assert "--advantage none" in refused.err
    assert run("filter", "-", "--delta-max", "1", "--advantage", "none", "-o", "-", stdin=stream).code == 0


def test_drop_leaves_rejected_rows_out_and_carries_the_counts(exact_scores: Path, train: Path, tmp_path: Path) -> None:
    dropped = filtered(exact_scores, tmp_path / "out", drop=True)
    assert dropped == [row for row in rows_of(train) if row["keep"]]
    success = json.loads((tmp_path / "out" / "_SUCCESS").read_text())
    assert (success["n_total"], success["n_kept"]) == (24, len(dropped))
    by_shard = [
        json.loads(pq.read_metadata(file).metadata[b"trm_audit.counts"])
        for file in sorted((tmp_path / "out" / "data").iterdir())
    ]
    assert sum(counts["n_total"] for counts in by_shard) == 24
    assert sum(counts["n_kept"] for counts in by_shard) == len(dropped)


def test_the_footer_says_by_what_and_of_which_model(exact_scores: Path, train: Path) -> None:
    footer = pq.read_metadata(train / "data" / "part-1.parquet").metadata
    criteria = json.loads(footer[b"trm_audit.filter"])["criteria"]
    assert (criteria["delta_max"], criteria["max_of"]) == (MEDIAN, "kl")
    scored_with = json.loads((exact_scores / "run.json").read_text())["model_hash"]
    assert json.loads(footer[b"trm_audit.run"])["model_hash"] == scored_with
    assert json.loads((train / "run.json").read_text())["criteria"]["max_of"] == "kl"


def test_columns_of_the_user_that_are_named_like_ours_are_carried_on(checkpoint: Path, tmp_path: Path) -> None:
    # GIVEN a user whose rollouts have columns called kl, keep, grade and, to make it hard, kl_stored
    rows = [{**rollout(i), "kl": "theirs", "keep": i, "grade": "A", "kl_stored": "too"} for i in range(2)]
    write_shard(tmp_path / "rollouts" / "a.parquet", rows)
    # WHEN they go through both stages
    score([str(tmp_path / "rollouts")], str(tmp_path / "scores"), ScoreOptions(model=checkpoint))
    first, _ = filtered(tmp_path / "scores", tmp_path / "train", delta_max=10.0)
    # THEN ours are ours and theirs are there
    assert (first["keep"], first["grade"]) == (True, "sampled")
    stored = {name: value for name, value in first.items() if "_stored" in name}
    assert stored == {"kl_stored": "too", "kl_stored_stored": "theirs", "grade_stored": "A", "keep_stored": 0}


@pytest.fixture
def unfinished(rollouts: Path, tmp_path: Path) -> Path:
    score([str(rollouts)], str(tmp_path / "scores"), ScoreOptions(trainer_logprobs="stored", part=(1, 2)))
    return tmp_path / "scores"


@pytest.mark.parametrize("command", ["filter", "report"])
def test_an_unfinished_score_folder_is_refused(run: Run, unfinished: Path, tmp_path: Path, command: str) -> None:
    arguments = (command, unfinished, "--delta-max", "1", *(("-o", tmp_path / "out") if command == "filter" else ()))
    refused = run(*arguments)
    assert refused.code == 3
    assert "its run is not finished (no _SUCCESS)" in refused.err
    assert "--allow-partial" in refused.err
    assert run(*arguments, "--allow-partial").code == 0


def test_allow_partial_takes_what_is_there(unfinished: Path, tmp_path: Path) -> None:
    assert len(filtered(unfinished, tmp_path / "out", allow_partial=True)) == 8


def test_scores_of_rollouts_that_are_gone_are_passed_over(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    # GIVEN two shards scored, and a second run after one of them was taken away
    rollouts, scores = tmp_path / "rollouts", str(tmp_path / "scores")
    for k in (0, 1):
        write_shard(rollouts / f"part-{k}.parquet", [rollout(10 * k + i) for i in range(4)])
    for left in (2, 1):
        assert score([str(rollouts)], scores, ScoreOptions(model=checkpoint)).done == (0 if left == 2 else 1)
        (rollouts / "part-1.parquet").unlink(missing_ok=True)
    # THEN its scores are not judged with the others, and that is said
    outcome = run("filter", scores, "--delta-max", "1", "-o", tmp_path / "out")
    assert "part-1.parquet is passed over" in outcome.err
    assert "of 4 sequences" in outcome.err


def test_scores_of_two_models_are_not_judged_together(exact_scores: Path, sampled_scores: Path, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    for k, folder in enumerate((exact_scores, sampled_scores)):
        (tmp_path / "both" / f"{k}.parquet").write_bytes((folder / "data" / "part-0.parquet").read_bytes())
    with pytest.raises(BadInput, match="scored with 2 different models"):
        filtered(tmp_path / "both", tmp_path / "out")


def test_a_mixture_of_grades_has_to_name_its_divergence(checkpoint: Path, tmp_path: Path) -> None:
    rows = [rollout(0, "exact"), rollout(1), rollout(2, "interval")]
    write_shard(tmp_path / "rollouts" / "a.parquet", rows)
    score([str(tmp_path / "rollouts")], str(tmp_path / "scores"), ScoreOptions(model=checkpoint))
    with pytest.raises(UsageError, match="several grades"):
        filtered(tmp_path / "scores", tmp_path / "out")
    named = FilterOptions(Criteria(delta_max=10.0, max_of="k2"))
    assert filter_scores([str(tmp_path / "scores")], str(tmp_path / "out"), named).n_kept == 3


def sketched(index: int) -> dict[str, Any]:
    """The row `rollout(index, "exact")` with sketches of its logits instead of them."""
    row = rollout(index, "exact")
    logits = torch.from_numpy(row.pop("logits"))
    found = evidence(logits, row["response_ids"], recipe=Recipe(k=5)).numpy()
    columns = sketch_columns([found], [np.ones(len(logits), dtype=bool)])
    return {**row, **{name: column[0].as_py() for name, column in columns.items()}, "logprobs_mode": "processed"}


@pytest.fixture(scope="module")
def half_sketched(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score folder, at 90 % confidence, of two shards of 12 rows, exact and sketched in turns."""
    folder = tmp_path_factory.mktemp("half-sketched")
    for k in range(2):
        rows = [sketched(i) if i % 2 else rollout(i, "exact") for i in range(12 * k, 12 * k + 12)]
        write_shard(folder / "rollouts" / f"part-{k}.parquet", rows)
    score([str(folder / "rollouts")], str(folder / "scores"), ScoreOptions(model=checkpoint, confidence=0.9))
    return folder / "scores"


def test_exact_and_sketched_rows_are_judged_by_one_threshold_on_kl(half_sketched: Path, tmp_path: Path) -> None:
    scores = rows_of(half_sketched)
    assert {row["grade"] for row in scores} == {"exact", "sketch"}
    options = FilterOptions(Criteria(delta_max=MEDIAN, max_of="kl", on_estimate=True))
    result = filter_scores([str(half_sketched)], str(tmp_path / "out"), options)
    rows = rows_of(tmp_path / "out")
    assert 0 < result.n_kept < result.n_total
    for row, known in zip(rows, scores, strict=True):
        decides = "seq_max_kl" if known["grade"] == "exact" else "seq_max_kl_estimate"
        assert known[decides] is not None
        assert row["keep"] == (known[decides] <= MEDIAN)
        assert row["keep"] or row["reason"].startswith(f"{decides}_above_delta_max(")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["criteria"]["on_estimate"] is True


@pytest.mark.parametrize(
    ("undecided", "delta", "bound", "cause"),
    [("mask", 0.2, "upper", "undecided_seq_max_tv"), ("keep", 0.1, "lower", "seq_max_tv_lower_above_delta_max")],
)
def test_sketched_rows_are_kept_by_the_bound_of_tv_that_undecided_asks_for(
    half_sketched: Path, tmp_path: Path, undecided: Undecided, delta: float, bound: str, cause: str
) -> None:
    criteria = Criteria(delta_max=delta, max_of="tv", undecided=undecided)
    filter_scores([str(half_sketched)], str(tmp_path / "out"), FilterOptions(criteria))
    pairs = zip(rows_of(tmp_path / "out"), rows_of(half_sketched), strict=True)
    sketches = [(row, known) for row, known in pairs if known["grade"] == "sketch"]
    for row, known in sketches:
        assert row["keep"] == (known[f"seq_max_tv_{bound}"] <= delta)
    assert {row["reason"] and row["reason"].split("(")[0] for row, _ in sketches} == {None, cause}


def test_the_lines_about_sketches_give_the_confidence_of_the_run_and_the_flag_that_decides(
    run: Run, half_sketched: Path, tmp_path: Path
) -> None:
    by_kl = ("filter", half_sketched, "--delta-max", str(MEDIAN), "--max-of", "kl", "-o", tmp_path / "out")
    outcome = run(*by_kl)
    assert "between the two --undecided mask; the bounds hold at 90 % confidence (sketch)" in outcome.err
    refused = run(*by_kl, "--undecided", "error", "--overwrite")
    assert refused.code == 3
    assert "let the estimate of kl decide with --on-estimate" in refused.err
    decided = run(*by_kl, "--undecided", "error", "--overwrite", "--on-estimate")
    assert decided.code == 0
    assert "max: kl <= 0.06 (exact)" in decided.err
    assert "max: kl_estimate <= 0.06 (sketch)" in decided.err


@pytest.mark.parametrize("command", ["filter", "report"])
def test_an_estimate_that_nothing_asks_for_is_a_usage_error(
    run: Run, half_sketched: Path, tmp_path: Path, command: str
) -> None:
    output = ("-o", tmp_path / "out") if command == "filter" else ()
    refused = run(command, half_sketched, "--on-estimate", *output)
    assert refused.code == 2
    assert "no criterion was given" in refused.err
    refused = run(command, half_sketched, "--on-estimate", "--delta-max", "1", "--max-of", "k2", *output)
    assert refused.code == 2
    assert "no threshold is on kl" in refused.err


def test_the_divergence_that_decides_is_printed(run: Run, sampled_scores: Path, tmp_path: Path) -> None:
    outcome = run("filter", sampled_scores, "--delta-max", "0.01", "--delta-avg", "0.002", "-o", tmp_path / "out")
    assert "max: k2 <= 0.01 (sampled)" in outcome.err
    assert "mean: k3 <= 0.002 (sampled)" in outcome.err
    assert "kept 12 of 24 sequences" in outcome.err


def expected(train: Path) -> dict[str, list[Any]]:
    names = ("rollout_id", "keep", "reason", "loss_mask", "trainer_logprobs", "advantage")
    rows = rows_of(train)
    return {name: [row[name] for row in rows] for name in names}


def test_pyarrow_reads_the_data_folder(train: Path) -> None:
    table = pyarrow.dataset.dataset(train / "data").to_table()
    assert {name: table[name].to_pylist() for name in expected(train)} == expected(train)


def test_polars_reads_the_data_folder(train: Path) -> None:
    import polars

    frame = polars.read_parquet(train / "data")
    assert {name: frame[name].to_list() for name in expected(train)} == expected(train)


def test_duckdb_reads_the_data_folder(train: Path) -> None:
    import duckdb

    with duckdb.connect() as connection:
        found = connection.sql(f"select * from '{train}/data/*.parquet' order by rollout_id")
        rows = [dict(zip(found.columns, values, strict=True)) for values in found.fetchall()]
    assert {name: [row[name] for row in rows] for name in expected(train)} == expected(train)


@pytest.mark.parametrize("how", ["data_dir", "data_files"])
def test_datasets_reads_the_data_folder(train: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    where = {"data_dir": str(train / "data")} if how == "data_dir" else {"data_files": f"{train}/data/*.parquet"}
    found = load_dataset("parquet", split="train", cache_dir=str(tmp_path), **where)
    assert {name: list(found[name]) for name in expected(train)} == expected(train)


def test_statistics_alone_are_enough(tmp_path: Path) -> None:
    # GIVEN scores without responses: verdicts need statistics only
    table = pa.table({"grade": ["sampled"] * 4, "num_tokens": [1] * 4, "seq_max_k2": [0.0, 0.1, np.nan, None]})
    pq.write_table(
        table.replace_schema_metadata({"trm_audit.kind": "scores", "trm_audit.schema_version": "1"}),
        tmp_path / "scores.parquet",
    )
    rows = filtered(tmp_path / "scores.parquet", tmp_path / "out", delta_max=0.1)
    assert [row["keep"] for row in rows] == [True, True, False, False]
    assert "loss_mask" not in rows[0]
