"""A summary for a pull request: short, the summary's own numbers, and nothing in it that comes to life on GitHub."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from report_rows import random_rows, run_with_floor, score_batch

from trm_audit.report.blocks import DeltaRow, DeltaTable, Finding, WorstSequence
from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.compare import Comparison, compare
from trm_audit.report.markdown import cell, code, prose, render_markdown
from trm_audit.report.shown import number, percent
from trm_audit.report.summary import AuditSummary, Category, CategoryDivergence, Thresholds

INVISIBLE = "\u200b"
INERT = {
    *("paragraph_open", "paragraph_close", "inline", "text", "code_inline", "text_special", "softbreak"),
    *("heading_open", "heading_close", "strong_open", "strong_close"),
    *("bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close"),
    *(f"{part}_{end}" for part in ("table", "thead", "tbody", "tr", "th", "td") for end in ("open", "close")),
}
"""What the report's own layout is made of."""
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</td></table><h1>x",
    "[a](http://evil.example)",
    "![a](http://evil.example/x.png)",
    "<http://evil.example>",
    "https://evil.example/x www.evil.example a@evil.example",
    "[a]: http://evil.example",
    "@octocat and @org/team fixes #123, GH-123, owner/repo#7, octocat@{1}",
    "a | b | c\n|---|---|\n| d | e |",
    "\\| \\\\| `|` \\",
    "`code` ``more`` ```",
    "```\nfenced\n```",
    "~~~\nfenced",
    "**bold** __bold__ *it* _it_ ~~gone~~ ~x~",
    "# heading",
    "heading\n=====\n-----",
    "- item\n+ item\n1. item\n2) item",
    "1986. A great year",
    "> quote",
    "***",
    "    indented code",
    "[x] done [^1] [!NOTE]",
    "&lt;b&gt; &amp; &#60;b&#62;",
    "$\\frac{1}{2}$ $$x$$ $`x`$",
    "\x1b[31mred\x07 \u202etxt.exe\u2066 \x00\x85\u2028",
    "a\r\nb\rc\x0bd",
    "`",
    "``",
    "",
    "   ",
    "@" * 300,
    "|" * 300,
    "`" * 300,
    "𒐫" * 300,
    "a`" * 300,
]


def parsed(text: str) -> list[Token]:
    """Every token of the document, as GitHub's dialect sees it."""
    out = []
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text):
        out += [token, *(token.children or [])]
    return out


def shown(text: str) -> str:
    """What a reader sees of one line of Markdown."""
    return "".join(t.content for t in parsed(text) if t.type in ("text", "code_inline", "text_special"))


def cleaned(text: str) -> str:
    """The text as it may appear: on one line, what a terminal would obey written out."""
    kept = "".join(c if c.isprintable() or c in "\u00a0\u3000" else f"<U+{ord(c):04X}>" for c in text)
    return " ".join(kept.split())


@functools.cache
def plain_summary() -> AuditSummary:
    rows = random_rows(np.random.default_rng(0), 60)
    builder = SummaryBuilder(Thresholds(delta_max=0.05, max_of="k2"), ["seq_max_k2 <= 0.05"])
    builder.add(score_batch(rows).append_column("keep", pa.array([i % 3 > 0 for i in range(60)])))
    return builder.finish(runs=[run_with_floor()])


@functools.cache
def plain_comparison() -> Comparison:
    audits = []
    for seed in (0, 1):
        builder = SummaryBuilder()
        builder.add(score_batch(random_rows(np.random.default_rng(seed), 60)))
        audits.append((builder, builder.finish()))
    (a, of_a), (b, of_b) = audits
    return compare(a, b, of_a, of_b, "before/", "after/")


def summary_of(name: str = "n", sentence: str = "Text.") -> AuditSummary:
    """A summary with something in every section; `name` and `sentence` stand wherever data can put theirs."""
    summary = plain_summary()
    spread = {each: CategoryDivergence(0.01, 0.5) for each in ("kl", name)}
    return replace(
        summary,
        counts=replace(summary.counts, grades={"exact": 60, name: 0}),
        verdict=sentence,
        evidence=sentence,
        warnings=[Finding("found", f"{sentence} {i}") for i in range(9)],
        num_warnings=9,
        reasons={f"{name}{i}": 9 - i for i in range(9)},
        delta_tables={"seq_max_kl": table_of([0.01, 0.05]), "seq_mean_kl": table_of([0.001, 0.01])},
        by_staleness=[Category(name + str(i), 5, 50, 0.5, spread) for i in range(12)],
        worst=[worst_of(name + str(i), name) for i in range(20)],
    )


def comparison_of(name: str = "n", sentence: str = "Text.") -> Comparison:
    return replace(plain_comparison(), name_a=name, name_b=name, verdict=sentence, notes=[sentence] * 12)


def table_of(deltas: list[float]) -> DeltaTable:
    rows = [DeltaRow(delta, 30, 10 * delta, 0.4, 12, 3, 0.25) for delta in deltas]
    return DeltaTable(n=60, num_tokens=300, marked=deltas[-1:], rows=rows)


def worst_of(rollout_id: str, group_id: str | None) -> WorstSequence:
    return WorstSequence(
        rollout_id=rollout_id,
        group_id=group_id,
        engine=None,
        staleness=None,
        reward=None,
        keep=None,
        statistic="seq_max_kl",
        divergence="kl",
        value=0.5,
        position=17,
        num_tokens=20,
        response_length=27,
        prompt_length=3,
        prompt=[],
        start=0,
        response=[],
    )


def lines_with(text: str, part: str) -> list[str]:
    return [line for line in text.splitlines() if part in line]


def test_the_verdict_comes_first_and_in_bold() -> None:
    text = render_markdown(summary_of(sentence="20 of 60 sequences kept."))
    assert text.startswith("### trm-audit report\n\n**20 of 60 sequences kept.**\n\n")
    assert [t.content for t in parsed(text) if t.type == "text"][:3] == [
        "trm-audit report",
        "",
        "20 of 60 sequences kept.",
    ]


def test_the_figures_are_those_of_the_summary() -> None:
    summary = summary_of()
    text = render_markdown(summary)
    assert "| sequences (N) | 60 (60 `exact`, 0 `n`) |" in text
    assert f"| kept | {summary.n_kept} ({100 * summary.n_kept / 60:.2f} %) |" in text
    assert summary.violations is not None
    share = summary.violations.sequences
    (line,) = lines_with(text, "sequences above delta_max = 0.05 by seq_max_k2")
    assert f"| {share.violations} ({100 * share.share:.2f} %) | at most {100 * share.upper_95:.2f} % |" in line
    for name in ("mean_kl", "mean_tv", "mean_k3"):
        metric = summary.metrics[name]
        row = f"| `{name}` | {number(metric.value)} | {number(metric.low)} to {number(metric.high)} |"
        assert row in text
    block = summary.bounds["all"]["exact"]
    least = block.bounds[block.minimum]
    (line,) = lines_with(text, "smallest bound")
    assert f"`{block.minimum}`" in line
    assert f"{least.published:.4g} published, {least.sharp:.4g} sharp" in line
    assert "| noise floor of kl, against float32 | 0.0012, max 0.03 |" in text


def test_marked_deltas_staleness_and_worst_sequences_are_shown_and_the_rest_is_counted() -> None:
    text = render_markdown(summary_of())
    assert "| `seq_max_kl` ≤ 0.05 | 50 % | 40 % | 0.25 |" in text
    assert "| `seq_mean_kl` ≤ 0.01 | 10 % | 40 % | 0.25 |" in text
    assert "≤ 0.001" not in text
    assert "| staleness (4 more) | n | kept | mean `kl` | max `kl` |" in text
    assert len(lines_with(text, "| 5 | 50 % | 0.01 | 0.5 |")) == 8
    assert lines_with(text, "at token") == [
        f"- `n{i}` of group `n`: `seq_max_kl` 0.5 at token 17 of 27" for i in range(3)
    ]
    assert "- 4 more in the full report." in text
    assert "4 more causes." in text


def test_the_thresholds_for_a_wanted_acceptance_are_shown() -> None:
    builder = SummaryBuilder()
    builder.add(score_batch(random_rows(np.random.default_rng(0), 60)))
    found = builder.finish(target_acceptance=0.9)
    text = render_markdown(found)
    (target,) = [each for each in found.targets if each.statistic == "seq_max_kl"]
    assert "| to keep 90 % | delta | keeps |" in text
    assert f"| `seq_max_kl` | {number(target.delta)} | {percent(target.share_kept)} |" in text
    assert "to keep" not in render_markdown(builder.finish())


def test_an_empty_summary_and_one_without_most_columns_are_readable() -> None:
    assert "**No rollouts were read.**" in render_markdown(SummaryBuilder().finish())
    builder = SummaryBuilder()
    builder.add(pa.RecordBatch.from_pydict({"rollout_id": ["x"], "seq_max_kl": [float("inf")]}))
    text = render_markdown(builder.finish())
    assert "| sequences (N) | 1 |" in text
    assert {t.type for t in parsed(text)} <= INERT


def test_a_comparison_shows_its_differences_with_intervals_first() -> None:
    found = plain_comparison()
    text = render_markdown(found)
    assert found.verdict in text
    assert "- A: `before/`\n- B: `after/`" in text
    drawn, _ = found.shown()
    rows = lines_with(text, "| `")
    assert [row.split("`")[1] for row in rows[: len(drawn)]] == list(drawn)
    each = drawn["mean_k3"]
    figures = (
        f"{number(each.a)} | {number(each.b)} | {number(each.difference)} | {number(each.low)} to {number(each.high)}"
    )
    assert f"| `mean_k3` | {figures} |" in rows


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(text: str) -> None:
    # GIVEN the text wherever a name or a sentence of the data can stand
    for found in (render_markdown(summary_of(text, text)), render_markdown(comparison_of(text, text))):
        tokens = parsed(found)
        # THEN the document consists of the report's own layout,
        assert {token.type for token in tokens} <= INERT
        # its tables have as many cells as their heads,
        for table in re.findall(r"(?:^\|.*\n)+", found, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
        # nothing in it is a mention, a reference, an address or a formula,
        outside = "\n".join(t.content for t in tokens if t.type in ("text", "text_special"))
        assert not re.search(r"@\w|#\d|\bGH-\d|://|www\.", outside, re.IGNORECASE)
        assert "$" not in re.sub(r"(`+)[^`].*?[^`]?\1(?!`)", "", found)
        # and nothing in it is obeyed by a terminal
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028]", found)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_as_it_is_written_or_cut(text: str) -> None:
    for form, change in ((code, {}), (cell, {"|": "¦"}), (prose, {})):
        line = shown(f"- x {form(text)}").removeprefix("x ").replace(INVISIBLE, "")
        wanted = cleaned(text)
        for a, b in change.items():
            wanted = wanted.replace(a, b)
        if line.endswith("…"):
            assert wanted.startswith(line[:-1])
            assert len(text) > 25
        else:
            assert line.strip() == (wanted or "-")


def test_ordinary_sentences_stay_readable_in_their_source() -> None:
    assert prose("max: seq_max_kl <= 0.05 (exact); 41.8 % kept.") == "max: seq_max_kl <= 0.05 (exact); 41.8 % kept."


@pytest.mark.parametrize("text", ["x", "@" * 5000, "<" * 5000, "𒐫" * 5000, "`" * 5000, "|" * 5000], ids=range(6))
def test_the_text_fits_a_pull_request_whatever_the_data(text: str) -> None:
    for found in (render_markdown(summary_of(text, text)), render_markdown(comparison_of(text, text))):
        assert len(found.encode()) < 10_000
        assert len(found.splitlines()) <= 60
