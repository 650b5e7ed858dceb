"""The terminal shows the summary's numbers at 80 columns and obeys nothing that comes from the data."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from report_rows import random_rows, score_batch
from rich.console import Console

from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.shown import visible
from trm_audit.report.summary import AuditSummary, Thresholds
from trm_audit.report.terminal import SHOWN_CATEGORIES, render

ESCAPE, BELL, RIGHT_TO_LEFT, ISOLATE = "\x1b", "\x07", "\u202e", "\u2066"


def summary_of(grade: str, **columns: list[object]) -> AuditSummary:
    rows = random_rows(np.random.default_rng(0), 40, grade)
    for name, values in columns.items():
        rows = [row | {name: values[i % len(values)]} for i, row in enumerate(rows)]
    builder = SummaryBuilder(Thresholds(delta_max=0.1, max_of="k2"), ["seq_max_k2 <= 0.1"])
    batch = score_batch(rows)
    small = np.nan_to_num(batch.column("seq_max_k2").to_numpy(zero_copy_only=False), nan=np.inf) <= 0.1
    builder.add(batch.append_column("keep", pa.array(small)))
    return builder.finish()


def printed(summary: AuditSummary, width: int = 80, color: bool = False, full: bool = True) -> str:
    out = io.StringIO()
    render(summary, Console(file=out, width=width, force_terminal=color, legacy_windows=False), full=full)
    return out.getvalue()


def test_the_verdict_is_the_first_line() -> None:
    summary = summary_of("exact")
    assert printed(summary).startswith(f"{summary.n_kept} of 40 sequences kept (")


@pytest.mark.parametrize("grade", ["exact", "sketch", "interval", "sampled"])
def test_eighty_columns_are_enough(grade: str) -> None:
    text = printed(summary_of(grade))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    # numbers are whole: no cell was cut
    assert "…" not in text


@pytest.mark.parametrize(
    ("grade", "suffix"), [("exact", ""), ("sketch", "_upper"), ("interval", "_upper"), ("sampled", "_estimate")]
)
def test_bounds_are_shown_published_and_sharp_with_their_verdict(grade: str, suffix: str) -> None:
    summary = summary_of(grade)
    text = printed(summary, width=200)
    block = summary.bounds["all"][grade]
    for name, pair in block.bounds.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert line.split()[1:3] == [f"{pair.published:.4g}", f"{pair.sharp:.4g}"]
        assert name.endswith(suffix)
    assert block.sentence in text


def test_sections_answer_questions_in_order() -> None:
    text = printed(summary_of("exact"))
    titles = (
        "What was read",
        "Above delta_max = 0.1, by seq_max_k2",
        "How far apart, per token",
        "How far apart, per sequence",
        "Share of sequences that a threshold alone would keep",
        "Bounds on",
        "By engine",
        "Note: ",
    )
    places = [text.index(title) for title in titles]
    assert places == sorted(places)


@pytest.mark.parametrize("grade", ["exact", "sketch", "interval", "sampled"])
def test_the_first_screen_fits_one_and_says_where_the_rest_is(grade: str) -> None:
    summary = summary_of(grade)
    text = printed(summary, full=False)
    lines = text.splitlines()
    assert len(lines) <= 60
    assert lines[0].startswith(f"{summary.n_kept} of 40 sequences kept (")
    for found in summary.warnings:
        assert " ".join(found.sentence.split()[:5]) in " ".join(text.split())
    for part in (
        "95 % upper limit",
        "mean_k3",
        "Share of sequences that a threshold",
        "Bound on the surrogate's error",
    ):
        assert part in text
    assert lines[-1].startswith("More: -o report.html")
    # AND nothing of it is missing from the whole
    whole = printed(summary).splitlines()
    assert {line for line in lines if line.startswith(("sequences ", "prompts ", "0.05 "))} <= set(whole)


def test_an_empty_summary_is_readable() -> None:
    assert printed(SummaryBuilder().finish()).startswith("No rollouts were read.")


def test_markup_and_escapes_in_the_data_are_text() -> None:
    # GIVEN engines that try markup, a hyperlink, a colour, a bell, a new title and right-to-left text
    hostile = [
        "[red]x[/red]",
        "[link=a]b[/link]",
        f"{ESCAPE}[31mred{ESCAPE}[0m{BELL}",
        f"{ESCAPE}]0;title{BELL}",
        f"{RIGHT_TO_LEFT}txt.exe{ISOLATE}",
        "[/]",
    ]
    text = printed(summary_of("sampled", engine=list(hostile)), color=True)
    # THEN markup is shown as it is written
    for literal in ("[red]x[/red]", "[link=a]b[/link]"):
        assert literal in text
    # and the only escapes are rich's own colours
    assert f"{ESCAPE}[31m" not in text
    assert f"{ESCAPE}]" not in text
    for mark in (BELL, RIGHT_TO_LEFT, ISOLATE):
        assert mark not in text


def test_text_keeps_languages_and_emoji_and_writes_out_what_a_terminal_obeys() -> None:
    assert visible("déjà vu 日本語 🙂") == "déjà vu 日本語 🙂"
    assert visible("a\tb\x9b31m\u200bf\u202eh\ud800") == "a<U+0009>b<U+009B>31m<U+200B>f<U+202E>h<U+D800>"


def test_many_categories_are_cut_and_the_rest_is_counted() -> None:
    summary = summary_of("sampled", engine=[f"engine-{i:02d}" for i in range(40)])
    text = printed(summary)
    assert f"engine-{SHOWN_CATEGORIES - 1:02d}" in text
    assert f"engine-{SHOWN_CATEGORIES:02d}" not in text
    assert f"{40 - SHOWN_CATEGORIES} more in the JSON report." in text
    assert len(summary.by_engine) == 40
