"""Thresholds below the noise of the scoring are named by report and filter; others, or without a floor, are not."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run
from report_rows import noise_of, random_rows, run_with_floor, score_batch
from rich.console import Console

from trm_audit.criteria.limits import limits
from trm_audit.criteria.thresholds import Criteria
from trm_audit.errors import BadInput
from trm_audit.numerics.estimators import sampled_divergences
from trm_audit.pipeline.filter import FilterOptions, filter_scores
from trm_audit.pipeline.report import ReportOptions, summarize
from trm_audit.report.noise import NoiseFloor, noise_floor
from trm_audit.report.summary import AuditSummary
from trm_audit.report.terminal import render
from trm_audit.shards.write import StreamSink, head

FLOAT32 = {"dtype": "float32", "head_dtype": "float32", "noise_floor": None}
BEFORE = {"dtype": "bfloat16", "head_dtype": "bfloat16"}  # written by a trm-audit that measured no noise

# What equal policies show, from the figures of `run_with_floor`: 1,290 tokens in 8 rollouts are 161.25 a rollout.
FLOORS = {
    "seq_max_kl": 0.03,
    "seq_mean_kl": 1.2e-3,
    "seq_sum_kl": 1.2e-3 * 161.25,
    "seq_max_kl_reverse": 0.03,
    "seq_max_kl_upper": 0.03,
    "seq_mean_kl_upper": 1.2e-3,
    "seq_max_k2": 0.2**2 / 2,
    "seq_mean_k2": 0.01**2 / 2,
    "seq_max_k3": math.exp(-0.2) - 1 + 0.2,
    "seq_mean_k3": 1.2e-3,
    "seq_sum_k3": 1.2e-3 * 161.25,
    "seq_max_abs_log_ratio": 0.2,
    "seq_mean_abs_log_ratio": 0.01,
    "seq_sum_abs_log_ratio": 0.01 * 161.25,
    "seq_max_log_ratio": 0.2,
    "seq_max_k1": 0.2,
}
UNKNOWN = ("seq_max_tv", "seq_mean_tv_upper", "seq_max_kl_lower", "seq_mean_log_ratio", "seq_sum_k1", "seq_max_ratio")


def floor_of(runs: list[dict[str, Any]], *limits: tuple[str, float]) -> NoiseFloor:
    found = noise_floor(runs, limits)
    assert found is not None
    return found


def spread_of(noise: object) -> dict[str, Any]:
    return json.loads(json.dumps(noise, default=vars))  # type: ignore[no-any-return]


@pytest.mark.parametrize("column", FLOORS)
def test_a_threshold_warns_below_the_floor_and_not_above(column: str) -> None:
    level = FLOORS[column]
    below = floor_of([run_with_floor()], (column, 0.999 * level)).below
    assert [(each.statistic, each.against) for each in below] == [(column, "float32")]
    assert below[0].floor == pytest.approx(level, rel=1e-12)
    assert floor_of([run_with_floor()], (column, 1.001 * level)).num_below == 0


@pytest.mark.parametrize("column", [*UNKNOWN, "num_tokens", "reward", "seq_kl", "seq_argmax_kl"])
def test_what_the_floor_does_not_tell_gives_no_warning(column: str) -> None:
    assert floor_of([run_with_floor()], (column, 0.0)).below == []


def test_a_threshold_at_the_floor_keeps_it() -> None:
    assert floor_of([run_with_floor(kl_max=0.03125)], ("seq_max_kl", 0.03125)).below == []


@pytest.mark.parametrize("seed", range(5))
def test_no_floor_is_above_what_equal_policies_show(seed: int) -> None:
    # GIVEN tokens drawn from the exact policy, and another scoring of the same weights that is off by rounding
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (4000, 50))
    exact = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    rounded = logits + rng.normal(0, 0.1, logits.shape)
    rounded -= np.logaddexp.reduce(rounded, axis=1, keepdims=True)
    tokens = (exact + rng.gumbel(size=exact.shape)).argmax(axis=1)
    delta = (rounded - exact)[np.arange(len(tokens)), tokens]
    kl = (np.exp(exact) * (exact - rounded)).sum(axis=1)
    figures = {"abs_mean": abs(delta).mean(), "abs_max": abs(delta).max(), "kl_mean": kl.mean(), "kl_max": kl.max()}
    run = run_with_floor(num_tokens=4000, composition=None, **figures)
    seen = {"kl": kl, **sampled_divergences(delta)}
    # WHEN each statistic of these tokens is a threshold
    largest = [(f"seq_max_{name}", seen[name].max()) for name in ("kl", "k2", "k3", "abs_log_ratio")]
    means = [(f"seq_mean_{name}", seen[name].mean()) for name in ("kl", "k2", "abs_log_ratio")]
    sums = [(f"seq_sum_{name}", seen[name].sum() / 8) for name in ("kl", "k2", "abs_log_ratio")]
    thresholds = [(column, float(level)) for column, level in largest + means + sums]
    # THEN none lies below the floor, and half of any does
    assert floor_of([run], *((column, level * (1 + 1e-9)) for column, level in thresholds)).below == []
    assert floor_of([run], *((column, level / 2) for column, level in thresholds)).num_below == len(thresholds)
    # and the floor of what is no bound is near: signs, the other direction, the expectation
    assert seen["k1"].max() == pytest.approx(abs(delta).max(), rel=0.3)
    assert (np.exp(rounded) * (rounded - exact)).sum(axis=1).max() == pytest.approx(kl.max(), rel=0.2)
    assert seen["k3"].mean() == pytest.approx(kl.mean(), rel=0.15)


def test_the_larger_comparison_decides() -> None:
    run = run_with_floor(composition=noise_of(kl_max=0.05))
    (below,) = floor_of([run], ("seq_max_kl", 0.04)).below
    assert (below.floor, below.against) == (0.05, "composition")
    assert "in another batch" in below.sentence
    assert "score in float32" in below.sentence


@pytest.mark.parametrize("run", [FLOAT32, {"trainer_logprobs": "stored", "sharing": None}, {}], ids=str)
def test_runs_in_float32_and_stored_values_have_no_floor(run: dict[str, Any]) -> None:
    assert noise_floor([run], [("seq_max_kl", 0.0)]) is None


@pytest.mark.parametrize("run", [BEFORE, BEFORE | {"noise_floor": None}], ids=["before", "null"])
def test_a_floor_that_nobody_measured_warns_of_nothing(run: dict[str, Any]) -> None:
    found = floor_of([run], ("seq_max_kl", 0.0))
    assert (found.num_runs, found.num_measured, found.float32, found.below) == (1, 0, None, [])


def test_a_head_below_float32_is_named() -> None:
    runs = [run_with_floor(head_dtype="float32"), run_with_floor(dtype="float32"), run_with_floor(), FLOAT32]
    assert floor_of(runs).dtypes == ["bfloat16", "bfloat16 (head float32)", "float32 (head bfloat16)"]


def test_of_several_runs_each_figure_is_the_largest_and_equal_runs_count_once() -> None:
    # GIVEN two runs of which each is noisier in something, one of them in two shards, and one that measured nothing
    one, two = run_with_floor(kl_max=0.5, abs_mean=0.002), run_with_floor(kl_max=0.1, abs_mean=0.04, composition=None)
    found = floor_of([one, two, dict(one), BEFORE])
    assert (found.num_runs, found.num_measured, found.num_rollouts, found.num_tokens) == (3, 2, 16, 2580)
    assert spread_of(found.float32) == noise_of(kl_max=0.5, abs_mean=0.04)
    assert spread_of(found.composition) == one["noise_floor"]["composition"]


def test_a_sum_is_compared_with_each_run_and_not_with_a_mixture() -> None:
    # GIVEN a noisy run of short rollouts and a quiet one of long ones: 0.1 and 1 nat a rollout
    short = run_with_floor(num_rollouts=100, num_tokens=1000, kl_mean=0.01, composition=None)
    long = run_with_floor(num_rollouts=1, num_tokens=1000, kl_mean=0.001, composition=None)
    assert floor_of([short, long], ("seq_sum_kl", 1.1)).below == []
    (below,) = floor_of([short, long], ("seq_sum_kl", 0.9)).below
    assert below.floor == pytest.approx(1.0)


@pytest.mark.parametrize(
    "broken",
    [
        "low",
        {},
        {"num_rollouts": 8, "num_tokens": 9, "float32": {"kl": {}}},
        {"num_rollouts": 8, "num_tokens": 9, "float32": noise_of(kl_max=math.nan)},
        {"num_rollouts": 8, "num_tokens": 9, "composition": noise_of(abs_mean=math.nan)},
    ],
    ids=str,
)
def test_a_floor_that_is_none_is_refused(broken: object) -> None:
    with pytest.raises(BadInput, match=r"noise floor in trm_audit\.run cannot be read"):
        noise_floor([BEFORE | {"noise_floor": broken}])


@pytest.mark.parametrize(
    ("given", "grades", "expected"),
    [
        ({"delta_max": 0.05, "delta_avg": 0.002}, ["exact"], [("seq_max_kl", 0.05), ("seq_mean_kl", 0.002)]),
        ({"delta_max": 0.05, "delta_total": 3}, ["sampled"], [("seq_max_k2", 0.05), ("seq_sum_k3", 3)]),
        ({"delta_max": 0.05}, ["interval"], [("seq_max_k2", 0.05), ("seq_max_kl_lower", 0.05)]),
        (
            {"delta_avg": 0.1, "avg_of": "kl"},
            ["exact", "interval"],
            [("seq_mean_kl", 0.1), ("seq_mean_kl_lower", 0.1), ("seq_mean_kl_upper", 0.1)],
        ),
        ({"delta_max": 0.1, "max_of": "kl", "undecided": "keep"}, ["interval"], [("seq_max_kl_lower", 0.1)]),
        ({"delta_max": 0.1}, [], []),
        ({"keep": "seq_max_kl <= 0.1"}, [], [("seq_max_kl", 0.1)]),
        ({"keep": "0.1 > seq_max_kl"}, ["exact"], [("seq_max_kl", 0.1)]),
        ({"keep": "1 <= a <= 2 and not (b > 3 or c < 4)"}, ["exact"], [("a", 2), ("b", 3)]),
        ({"keep": "a >= 1 or a == 2 or not a <= 3 or a < b or exp(a) < 4 or a > -5 or a != 6"}, ["exact"], []),
        ({"delta_max": 0.1, "keep": "seq_max_kl < 0.1 and not not a < 5"}, ["exact"], [("seq_max_kl", 0.1), ("a", 5)]),
    ],
    ids=str,
)
def test_limits_are_what_a_score_must_not_exceed(
    given: dict[str, Any], grades: list[str], expected: list[tuple[str, float]]
) -> None:
    assert limits(Criteria(**given), set(grades)) == expected


def write_scores(
    folder: Path, *runs: dict[str, Any] | None, grade: str = "exact", fingerprint: str | None = None
) -> Path:
    """A score shard for each run."""
    (folder / "data").mkdir(parents=True)
    for k, run in enumerate(runs):
        batch = scores_of(k, grade)
        stated = {"run": run, "fingerprint": fingerprint}
        metadata = head("scores", **{name: value for name, value in stated.items() if value is not None})
        table = pa.Table.from_batches([batch]).replace_schema_metadata(metadata)
        pq.write_table(table, folder / "data" / f"part-{k}.parquet")
    return folder


def scores_of(seed: int, grade: str) -> pa.RecordBatch:
    return score_batch(random_rows(np.random.default_rng(seed), 12, grade))


def report_on(scores: Path, **criteria: Any) -> AuditSummary:
    return summarize([str(scores)], ReportOptions(Criteria(**criteria) if criteria else None))


def printed(summary: AuditSummary) -> str:
    out = io.StringIO()
    render(summary, Console(file=out, width=80, legacy_windows=False), full=True)
    return out.getvalue()


def test_the_report_shows_the_floor_the_rung_and_the_thresholds_below_it(tmp_path: Path) -> None:
    # GIVEN a bfloat16 run
    summary = report_on(write_scores(tmp_path, run_with_floor()), delta_max=0.02, keep="seq_mean_k3 <= 2e-3")
    text = printed(summary)
    # THEN the floor, in 80 columns
    assert "Noise floor of the scoring (bfloat16; 8 rollouts, 1,290 tokens)" in text
    lines = {line[:36].strip(): line[36:].split() for line in text.splitlines()}
    assert lines["kl against float32"] == ["0.0012", "0.009", "0.03"]
    assert lines["abs_delta_logprob in another batch"] == ["0.004", "0.02", "0.06"]
    assert max(map(len, text.splitlines())) <= 80
    # and once what scored, and how prefixes were shared
    for name, value in (("dtype", "bfloat16"), ("head_dtype", "bfloat16"), ("device", "cuda"), ("sharing", "tree")):
        assert [line.split()[-1] for line in text.splitlines() if f"scored with {name} " in line] == [value]
    # and the one threshold that is too small
    (note,) = [found.sentence for found in summary.warnings if found.code == "below_noise_floor"]
    assert note.startswith("The threshold 0.02 on seq_max_kl lies below the noise floor of the scoring, 0.03")
    assert summary.to_dict()["noise_floor"]["below"][0]["statistic"] == "seq_max_kl"


def test_a_report_on_float32_says_nothing_of_noise(tmp_path: Path) -> None:
    summary = report_on(write_scores(tmp_path, FLOAT32), delta_max=0.0)
    assert summary.noise_floor is None
    assert "noise" not in printed(summary).lower()


@pytest.mark.parametrize("run", [None, {"model_hash": "5c1e"}], ids=["no run", "no precision"])
def test_shards_that_say_nothing_of_a_run_are_reported_on(tmp_path: Path, run: dict[str, Any] | None) -> None:
    summary = report_on(write_scores(tmp_path, run), delta_max=0.0)
    assert (summary.run, summary.noise_floor) == (run, None)


def test_a_floor_that_was_not_measured_is_said(tmp_path: Path) -> None:
    summary = report_on(write_scores(tmp_path / "one", BEFORE), delta_max=0.0)
    (found,) = [found for found in summary.warnings if found.code == "unmeasured_noise_floor"]
    assert found.sentence.startswith("Scored in bfloat16, and the noise floor of that was not measured:")
    assert "Noise floor" not in printed(summary)
    both = report_on(write_scores(tmp_path / "both", run_with_floor(), BEFORE | {"model_hash": "5c1e"}))
    assert any("not measured in 1 of 2 runs" in found.sentence for found in both.warnings)


def test_runs_that_differ_are_named(tmp_path: Path) -> None:
    forked = {"sharing": {"rung": "fork", "check": None, "refused": {"tree": 0.3}}}
    same_rung = {"sharing": {"rung": "tree", "check": 2.2e-6, "refused": {}}, "kl_max": 0.04}
    scores = write_scores(tmp_path / "a", run_with_floor(), run_with_floor(device="cpu", **forked))
    assert report_on(scores).notes[0] == (
        "The shards were scored by runs that differ in device, sharing; the first is shown."
    )
    alike = report_on(write_scores(tmp_path / "b", run_with_floor(), run_with_floor(**same_rung)))
    assert not any("differ in" in note for note in alike.notes)
    assert "16 rollouts, 2,580 tokens, largest of 2 runs" in " ".join(printed(alike).split())


def test_gates_can_name_the_floor(run: Run, tmp_path: Path) -> None:
    scores = write_scores(tmp_path, run_with_floor())
    command = ("report", scores, "--delta-max", "0.02")
    assert run(*command, "--fail-on", "noise_floor.float32.kl.max>0.03").code == 0
    assert run(*command, "--fail-on", "run.sharing.check>1e-4").code == 0
    failed = run(*command, "--fail-on", "noise_floor.num_below>0", "--fail-on", "noise_floor.float32.kl.max>0.02")
    assert failed.code == 1
    assert "noise_floor.num_below is 1" in failed.err
    assert "noise_floor.float32.kl.max is 0.03" in failed.err


def filter_notes(run: Run, *arguments: object, stdin: bytes = b"") -> list[str]:
    outcome = run("filter", *arguments, stdin=stdin)
    assert outcome.code == 0, outcome.err
    return [line for line in outcome.err.splitlines() if "noise floor" in line]


def test_filter_warns_of_the_same_thresholds(run: Run, tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "scores", run_with_floor(), grade="sampled")
    (warning,) = filter_notes(run, scores, "--delta-max", "0.01", "--delta-avg", "0.01", "-o", tmp_path / "out")
    assert warning.startswith("Warning: The threshold 0.01 on seq_max_k2 lies below the noise floor of the scoring")
    warnings = report_on(scores, delta_max=0.01, delta_avg=0.01).warnings
    assert warning.removeprefix("Warning: ") in [found.sentence for found in warnings]
    assert filter_notes(run, scores, "--delta-max", "0.03", "-o", tmp_path / "wide") == []


def test_filter_warns_in_a_pipe_too(run: Run) -> None:
    stream = io.BytesIO()
    sink = StreamSink(stream, head("scores", run=run_with_floor()))
    sink.write(scores_of(0, "exact").drop_columns(["reward"]))
    sink.close({})
    assert len(filter_notes(run, "-", "--delta-max", "0.01", "-o", "-", stdin=stream.getvalue())) == 1
    summary = summarize(["-"], ReportOptions(Criteria(delta_max=0.01)), source=io.BytesIO(stream.getvalue()))
    assert summary.noise_floor is not None
    assert summary.noise_floor.num_below == 1


def test_training_shards_carry_the_floor_of_their_own_run(tmp_path: Path) -> None:
    # GIVEN two shards whose runs measured different floors
    runs = run_with_floor(), run_with_floor(kl_max=0.4)
    scores = write_scores(tmp_path / "scores", *runs)
    filter_scores([str(scores)], str(tmp_path / "out"), FilterOptions(Criteria(delta_max=0.3)))
    footers = [pq.read_metadata(file).metadata for file in sorted((tmp_path / "out" / "data").iterdir())]
    assert [json.loads(footer[b"trm_audit.run"]) for footer in footers] == list(runs)
    # THEN a report on them says what one on the scores says
    found, expected = report_on(tmp_path / "out"), report_on(scores, delta_max=0.3)
    assert found.noise_floor == expected.noise_floor
    assert expected.noise_floor is not None
    assert expected.noise_floor.num_below == 1


@pytest.mark.parametrize(("other", "done"), [({"kl_max": 0.04}, 1), ({"dtype": "float16"}, None)], ids=str)
def test_a_filter_goes_on_where_only_measured_figures_are_others(
    tmp_path: Path, other: dict[str, Any], done: int | None
) -> None:
    # GIVEN scores that were filtered, and made once more
    def filtered(name: str, run: dict[str, Any]) -> int:
        scores = write_scores(tmp_path / name, run, fingerprint="77ab")
        return filter_scores([str(scores)], str(tmp_path / "out"), FilterOptions(Criteria(delta_max=0.3))).done

    filtered("first", run_with_floor())
    # THEN other noise makes no other run, another precision does
    if done is None:
        with pytest.raises(BadInput, match="another score_run"):
            filtered("again", run_with_floor(**other))
    else:
        assert filtered("again", run_with_floor(**other)) == done
