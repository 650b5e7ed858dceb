"""`trm-audit report` as users call it: formats, files, two audits, gates on their difference, tokens as text."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import Run

from trm_audit import Criteria, ReportOptions, ScoreOptions, score
from trm_audit.errors import BadInput, UsageError
from trm_audit.pipeline.report import compare, default_criteria, summarize

SAMPLES = Path(__file__).parents[1] / "sample_data"
DELTA = ("--delta-max", "0.05")


@pytest.fixture(scope="module")
def tiny_scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of the first 40 rollouts of the tiny sample, whose model has a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "scores"
    score([str(SAMPLES / "tiny" / "rollouts")], str(folder), ScoreOptions(model=SAMPLES / "tiny" / "model", limit=40))
    return folder


@pytest.mark.parametrize(
    ("name", "begins"), [("a.html", "<!DOCTYPE html>"), ("a.md", "### trm-audit"), ("a.json", '{\n  "kind": "report"')]
)
def test_the_suffix_of_the_file_chooses_the_format(
    run: Run, sampled_scores: Path, tmp_path: Path, name: str, begins: str
) -> None:
    outcome = run("report", sampled_scores, *DELTA, "-o", tmp_path / name)
    assert (outcome.code, outcome.out) == (0, b""), outcome.err
    assert (tmp_path / name).read_text().startswith(begins)
    # one line tells what was found and where it is
    assert "sequences kept" in outcome.err
    assert outcome.err.rstrip().endswith(name)


def test_the_format_can_be_named_for_standard_output(run: Run, sampled_scores: Path) -> None:
    for form, begins in (
        ("html", b"<!DOCTYPE html>"),
        ("md", b"### trm-audit"),
        ("json", b"{"),
        ("terminal", b"6 of 24"),
    ):
        assert run("report", sampled_scores, "--format", form).out.startswith(begins)
    assert run("report", sampled_scores, "--json").out == run("report", sampled_scores, "--format", "json").out


def test_a_file_without_a_known_suffix_is_an_error_that_names_those_there_are(
    run: Run, sampled_scores: Path, tmp_path: Path
) -> None:
    outcome = run("report", sampled_scores, "-o", tmp_path / "a.parquet")
    assert outcome.code == 2
    assert ".html, .md, .json" in outcome.err
    assert run("report", sampled_scores, "-o", tmp_path / "report", "--format", "md").code == 0


def test_a_report_is_never_overwritten_unasked(run: Run, sampled_scores: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("precious")
    outcome = run("report", sampled_scores, "-o", file)
    assert outcome.code == 2
    assert "--overwrite" in outcome.err
    assert file.read_text() == "precious"
    assert run("report", sampled_scores, "-o", file, "--overwrite").code == 0
    # the same report again is no loss
    assert run("report", sampled_scores, "-o", file).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_report_into_a_folder_that_is_not_there_says_so(run: Run, sampled_scores: Path, tmp_path: Path) -> None:
    outcome = run("report", sampled_scores, "-o", tmp_path / "none" / "a.json")
    assert outcome.code == 3
    assert "cannot be written" in outcome.err


def test_the_same_scores_make_the_same_bytes(run: Run, exact_scores: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        run("report", exact_scores, *DELTA, "-o", tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_target_acceptance_names_thresholds_that_keep_as_much(run: Run, exact_scores: Path) -> None:
    outcome = run("report", exact_scores, "--target-acceptance", "80%", "--json")
    targets = json.loads(outcome.out)["targets"]
    rows = [row for file in sorted((exact_scores / "data").iterdir()) for row in pq.read_table(file).to_pylist()]
    for target in targets:
        values = [row[target["statistic"]] for row in rows]
        kept = sum(value is not None and value <= target["delta"] for value in values)
        assert kept / len(rows) == target["share_kept"] >= 0.8
    assert {target["statistic"] for target in targets} >= {"seq_max_kl", "seq_mean_kl", "seq_sum_kl", "seq_mean_k3"}
    assert b"Thresholds that keep 80 %" in run("report", exact_scores, "--target-acceptance", "0.8").out
    assert run("report", exact_scores, "--target-acceptance", "1.2").code == 2


def test_two_folders_are_compared_and_anything_else_is_one_data_set(
    run: Run, exact_scores: Path, sampled_scores: Path, tmp_path: Path
) -> None:
    both = (exact_scores, sampled_scores)
    assert json.loads(run("report", *both, "--json").out)["kind"] == "comparison"
    assert run("report", *both).out.decode().splitlines()[0]
    assert b"<svg" in run("report", *both, "--format", "html").out
    assert run("report", *both, "--format", "md").out.startswith(b"### trm-audit report, A against B")
    files = sorted((sampled_scores / "data").iterdir())[:2]
    assert json.loads(run("report", *files, "--json").out)["counts"]["n_total"] == 16


def test_two_folders_can_be_taken_as_one_data_set(run: Run, sampled_scores: Path, tmp_path: Path) -> None:
    # GIVEN the halves of a data set in two folders
    for half, files in (("a", slice(0, 1)), ("b", slice(1, 3))):
        (tmp_path / half).mkdir()
        for file in sorted((sampled_scores / "data").iterdir())[files]:
            (tmp_path / half / file.name).symlink_to(file)
    pooled = run("report", tmp_path / "a", tmp_path / "b", "--pool", "--json")
    assert json.loads(pooled.out)["counts"]["n_total"] == 24


def test_folders_whose_shards_have_the_same_names_can_be_taken_as_one_data_set(
    run: Run, sampled_scores: Path, tmp_path: Path
) -> None:
    files = sorted((sampled_scores / "data").iterdir())
    for half, file in (("a", files[0]), ("b", files[1])):
        (tmp_path / half).mkdir()
        (tmp_path / half / "scores.parquet").symlink_to(file)
    pooled = run("report", tmp_path / "a", tmp_path / "b", "--pool", "--json")
    assert json.loads(pooled.out)["counts"]["n_total"] == sum(pq.read_metadata(file).num_rows for file in files[:2])
    # a file that is named twice counts once
    twice = run("report", sampled_scores, files[0], "--json")
    assert json.loads(twice.out)["counts"]["n_total"] == 24


def test_scores_and_training_shards_are_not_one_data_set(run: Run, sampled_scores: Path, tmp_path: Path) -> None:
    assert run("filter", sampled_scores, *DELTA, "-o", tmp_path / "train").code == 0
    outcome = run("report", sampled_scores, tmp_path / "train", "--pool")
    assert outcome.code == 3
    assert "score shards and training shards were given" in outcome.err


def test_gates_hold_the_difference_of_two_audits(run: Run, sampled_scores: Path, exact_scores: Path) -> None:
    same = run("report", sampled_scores, sampled_scores, "--json", "--fail-on", "differences.mean_k3.difference!=0")
    assert same.code == 0
    found = json.loads(same.out)["differences"]["mean_k3"]
    assert (found["difference"], found["low"], found["high"], found["paired"]) == (0, 0, 0, True)
    failed = run("report", sampled_scores, exact_scores, "--fail-on", "differences.mean_k3.difference!=0")
    assert failed.code == 1
    assert "differences.mean_k3.difference is" in failed.err
    assert run("report", sampled_scores, sampled_scores, *DELTA, "--fail-on", "b.acceptance<=1").code == 1


def test_comparing_needs_two_data_sets_that_can_be_read(sampled_scores: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        compare(str(sampled_scores), str(tmp_path), ReportOptions())


def test_scores_keep_the_tokenizer_of_their_model_and_the_report_shows_text(tiny_scores: Path) -> None:
    assert (tiny_scores / "tokenizer.json").read_bytes() == (SAMPLES / "tiny/model/tokenizer.json").read_bytes()
    worst = summarize([str(tiny_scores)], ReportOptions()).worst[0]
    rows = [row for file in sorted((tiny_scores / "data").iterdir()) for row in pq.read_table(file).to_pylist()]
    (row,) = [row for row in rows if row["rollout_id"] == worst.rollout_id]
    assert "".join(token.text or "" for token in worst.response) == row["response_text"] + "<eos>"
    assert worst.response[worst.position or 0].value == pytest.approx(worst.value, rel=1e-6)


def test_training_shards_keep_it_too(run: Run, tiny_scores: Path, tmp_path: Path) -> None:
    run("filter", tiny_scores, *DELTA, "-o", tmp_path / "train")
    assert (tmp_path / "train" / "tokenizer.json").is_file()
    assert summarize([str(tmp_path / "train")], ReportOptions()).worst[0].response[0].text is not None


def test_without_a_tokenizer_tokens_are_ids(exact_scores: Path) -> None:
    summary = summarize([str(exact_scores)], ReportOptions())
    assert {token.text for token in summary.worst[0].response} == {None}
    assert {row.text for row in summary.by_token} == {None}


def test_another_tokenizer_can_be_named(run: Run, exact_scores: Path, tmp_path: Path) -> None:
    outcome = run("report", exact_scores, "--tokenizer", SAMPLES / "tiny" / "model", "--json")
    assert json.loads(outcome.out)["by_token"][0]["text"] is not None
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        summarize([str(exact_scores)], ReportOptions(tokenizer=tmp_path))


def test_a_report_on_a_stream_is_the_report_on_its_folder(run: Run, tiny_scores: Path) -> None:
    # GIVEN the same scores as a stream
    rollouts, model = SAMPLES / "tiny" / "rollouts", SAMPLES / "tiny" / "model"
    stream = run("score", rollouts, "--model", model, "--limit", 40, "-o", "-").out
    piped = run("report", "-", *DELTA, "--tokenizer", model, "--json", stdin=stream)
    assert piped.code == 0, piped.err
    ours, theirs = json.loads(run("report", tiny_scores, *DELTA, "--json").out), json.loads(piped.out)
    for name in ("counts", "metrics", "acceptance_curves", "worst", "by_position", "impulses"):
        assert theirs[name] == ours[name], name


class Numbers(HTMLParser):
    """Collects tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def test_the_page_of_real_scores_is_one_file_without_scripts(run: Run, tiny_scores: Path) -> None:
    page = Numbers()
    page.feed(run("report", tiny_scores, *DELTA, "--format", "html").out.decode())
    assert {"svg", "table", "details", "meta"} <= set(page.tags)
    assert not {"script", "link", "iframe", "object", "img", "form"} & set(page.tags)


def test_of_dropped_rows_the_bounds_of_the_kept_are_shown_alone(run: Run, exact_scores: Path, tmp_path: Path) -> None:
    run("filter", exact_scores, *DELTA, "--drop", "-o", tmp_path / "train")
    for form in (("--full",), ("--format", "html")):
        assert b"conditional on the kept sequences" in b" ".join(run("report", tmp_path / "train", *form).out.split())
    assert b"Bound on the surrogate's error (exact)" in run("report", tmp_path / "train").out
    assert b"smallest bound" in run("report", tmp_path / "train", "--format", "md").out


def test_without_criteria_the_papers_thresholds_judge_and_the_verdict_says_so(run: Run, exact_scores: Path) -> None:
    ours = summarize([str(exact_scores)], ReportOptions())
    given = summarize([str(exact_scores)], ReportOptions(Criteria(delta_max=0.05, delta_avg=0.001)))
    assert (ours.n_kept, ours.reasons, ours.violations) == (given.n_kept, given.reasons, given.violations)
    assert ours.violations is not None
    assert "max: kl <= 0.05 (exact), by default; mean: kl <= 0.001 (exact), by default" in ours.verdict


def test_data_that_the_papers_thresholds_do_not_fit_are_not_judged(exact_scores: Path) -> None:
    names = set(pq.read_schema(sorted((exact_scores / "data").iterdir())[0]).names)
    assert default_criteria({"exact"}, names) == Criteria(delta_max=0.05, delta_avg=0.001)
    assert default_criteria({"exact", "sampled"}, names) is None
    assert default_criteria({"exact"}, names - {"seq_mean_kl"}) is None
    assert default_criteria(set(), names) is None


def test_a_gate_without_its_path_is_told_the_path(run: Run, sampled_scores: Path) -> None:
    outcome = run("report", sampled_scores, "--fail-on", "mean_k3>0")
    assert outcome.code == 2
    assert "Near: metrics.mean_k3.value," in outcome.err


def test_words_in_a_column_of_numbers_are_an_error_that_names_it(
    run: Run, sampled_scores: Path, tmp_path: Path
) -> None:
    file = sorted((sampled_scores / "data").iterdir())[0]
    table = pq.read_table(file)
    at = table.schema.get_field_index("seq_max_abs_log_ratio")
    changed = table.set_column(at, "seq_max_abs_log_ratio", [["far"] * len(table)])
    footer = {k: v for k, v in pq.read_metadata(file).metadata.items() if k.startswith(b"trm_audit")}
    pq.write_table(changed.replace_schema_metadata(footer), tmp_path / file.name)
    outcome = run("report", tmp_path)
    assert outcome.code == 3
    assert "'seq_max_abs_log_ratio' is string, numbers are needed" in outcome.err
