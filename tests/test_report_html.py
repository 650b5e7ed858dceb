"""The page as text: every number is the summary's, every text of the data is inert, the same bytes every time."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_page import HOSTILE, category, distribution, full_summary, quantiles, worst
from report_rows import random_rows, score_batch

from trm_audit.report.blocks import AcceptanceByLength, LengthCurve, ProbabilityDensity, ShownToken
from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.compare import Comparison, Difference
from trm_audit.report.deltas import given_thresholds
from trm_audit.report.page.html import render_comparison_html, render_html
from trm_audit.report.shown import SHADES, number, percent, shade, visible, visible_token
from trm_audit.report.summary import AuditSummary, CombinedAcceptance, Counts, Thresholds

ALL_FIGURES = 19
KL = ("kl", "kl_estimate", "kl_lower", "kl_upper")
HERE = Path(__file__).parent
VOID = {"meta", "br", "path", "use"}
NUMBER = re.compile(r"(?<![\w.+-])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\w)")


class Page(HTMLParser):
    """Elements, attributes and texts of a page, and that every element is closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.figure_texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        drawn = "svg" in self.open and self.open[-1] not in ("title", "desc")
        (self.figure_texts if drawn else self.texts).append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture(scope="module")
def summary() -> AuditSummary:
    return full_summary()


@pytest.fixture(scope="module")
def html(summary: AuditSummary) -> str:
    return render_html(summary)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def small_summary() -> AuditSummary:
    """Of an audit that read nothing."""
    return AuditSummary(
        verdict="No rollouts were read.",
        notes=[],
        counts=Counts(0, {}, {}, 0, None, 0, 0, 0, 0, 0, None),
        run=None,
        criteria=[],
        thresholds=full_summary(("x",) * 3).thresholds,
        noise_floor=None,
        n_kept=None,
        acceptance=None,
        reasons={},
        violations=None,
        tokens={},
        sequences={},
        d_max={},
        d_seq={},
        bounds={},
        rewards=None,
        ppo=None,
    )


def numbers_in(tree: Any) -> Iterator[float]:
    """Every number of a JSON tree."""
    if isinstance(tree, dict):
        for entry in tree.values():
            yield from numbers_in(entry)
    elif isinstance(tree, list):
        for entry in tree:
            yield from numbers_in(entry)
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield tree


def strings_in(tree: Any) -> Iterator[str]:
    """Every text of a JSON tree, keys as well."""
    if isinstance(tree, dict):
        yield from tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for entry in tree:
            yield from strings_in(entry)
    elif isinstance(tree, str):
        yield tree


def numerals(text: str) -> set[str]:
    return set(NUMBER.findall(text))


def test_every_number_on_the_page_is_one_of_the_summary(summary: AuditSummary, page: Page) -> None:
    # GIVEN what the numbers of the JSON look like, what stands in its texts, and the numerals of our own sentences
    tree = json.loads(summary.to_json())
    allowed = {form for value in numbers_in(tree) for form in (number(value), str(value), *numerals(percent(value)))}
    allowed |= {found for text in strings_in(tree) for found in numerals(visible_token(text)) | numerals(visible(text))}
    folder = HERE.parent / "trm_audit" / "report" / "page" / "templates"
    for file in sorted(folder.glob("*.html")):
        allowed |= numerals(re.sub(r"{[{%].*?[%}]}", " ", file.read_text("utf-8")))
    allowed |= {number(edge) for edge in SHADES} | {"0", "1"}
    # WHEN the texts, alternative texts and titles of the page are read
    found = {
        each for text in (*page.texts, *page.values("title"), *page.values("aria-label")) for each in numerals(text)
    }
    # THEN there is none besides
    assert found - allowed == set()
    assert len(found) > 500


def test_each_hostile_text_is_on_the_page_as_text_and_only_so(page: Page) -> None:
    everything = "\n".join(page.texts)
    for text in HOSTILE:
        assert visible(text[:100]) in everything


def test_nothing_on_the_page_can_run_or_ask_for_anything(html: str, page: Page) -> None:
    assert not {"script", "img", "iframe", "object", "embed", "link", "a-", "form", "foreignobject", "base"} & set(
        page.tags
    )
    names = {name for _, name, _ in page.attributes}
    assert not [name for name in names if name.startswith("on")]
    assert not {"src", "srcset", "action", "formaction", "xlink:href", "background", "data", "srcdoc"} & names
    assert all(value.startswith("#") for value in page.values("href"))
    assert all(not re.search(r"url\((?!#)|expression|@import", value) for value in page.values("style"))
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\(|@import|expression", style)
    assert page.tags.count("style") == 1


def test_the_policy_forbids_what_the_page_does_without(page: Page) -> None:
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert ("meta", "content", policy) in page.attributes


def test_no_character_of_the_page_is_obeyed_by_a_terminal_or_turns_text_around(html: str) -> None:
    assert not re.search(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]", html
    )
    html.encode("utf-8")


def test_every_element_is_closed_and_every_id_stands_once(page: Page) -> None:
    assert page.open == []
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    used = {value[1:] for value in page.values("href")}
    used |= {name for value in page.values("aria-labelledby") for name in value.split()}
    used |= {name for value in page.values("clip-path") for name in re.findall(r"#([^)]+)", value)}
    assert used <= set(ids)


def test_every_figure_has_a_title_alternative_text_and_its_numbers(page: Page) -> None:
    figures = page.tags.count("figure")
    assert figures == page.tags.count("figcaption") == page.tags.count("svg") == page.tags.count("desc") == ALL_FIGURES
    assert page.values("role").count("img") == figures
    assert "Numbers" in page.texts
    assert page.texts.count("Numbers") == figures


def test_figures_have_no_colour_of_their_own_and_no_text_of_the_data(html: str, page: Page) -> None:
    for figure in re.findall(r"<svg.*?</svg>", html, flags=re.S):
        drawing = figure[figure.index("</desc>") :]
        assert not re.search(r"#[0-9a-f]{6}|rgb\(", drawing)
        assert "var(--" in drawing
    drawn = "".join(page.figure_texts)
    assert not [text for text in HOSTILE if text[:12] in drawn]


def test_colours_are_defined_for_light_and_for_dark(html: str) -> None:
    used = set(re.findall(r"var\((--[a-z]\w*)\)", html))
    light, dark = html.split("@media screen and (prefers-color-scheme: dark)")
    dark = dark[: dark.index("* {")]
    assert {name for name in used if f"{name}: " not in light} == {"--w"}
    assert {name for name in used if f"{name}: " not in dark} == {"--w"}


def test_the_largest_divergence_of_a_sequence_is_outlined_and_named_in_the_text(html: str, page: Page) -> None:
    assert page.values("class").count("s8 peak") == len(HOSTILE)
    assert page.texts.count("kl 3.7") == len(HOSTILE)
    assert "seq_max_kl = inf" in page.texts
    assert "<i>… from index 200: </i>" in html


def test_the_page_is_small_however_hostile_the_data(html: str) -> None:
    assert len(html.encode()) < 1_000_000


def test_many_versions_and_engines_do_not_make_the_page_long() -> None:
    many = [category(i, 0.01, 0.5) for i in range(20_000)]
    engines = [category(f"engine {i}", 0.01, 0.5) for i in range(20_000)]
    text = render_html(
        dataclasses.replace(
            small_summary(), by_policy_version=many, by_staleness=many, by_engine=engines, by_group=engines
        )
    )
    assert len(text) < 300_000
    assert "19,999" not in text
    assert '<th scope="row">19999</th>' in text
    assert "engine 39<" in text
    assert "engine 40<" not in text


def test_another_process_with_other_hashes_writes_the_same_bytes(html: str) -> None:
    code = "import sys, report_page as r; from trm_audit.report.page.html import render_html;"
    code += "sys.stdout.buffer.write(render_html(r.full_summary()).encode())"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(HERE)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert run.stdout.decode() == html


def test_the_first_screen_answers_before_it_warns_and_explains(html: str, summary: AuditSummary) -> None:
    # GIVEN verdict, shares with their limits, and the noise floor beside the threshold
    assert summary.violations is not None
    assert summary.violations.prompts is not None
    first = html[html.index('id="train"') : html.index('class="warnings"')]
    # THEN they stand before the first warning
    assert html.index(escape(summary.verdict)) < html.index('<dl class="tiles">')
    for found in (summary.violations.sequences, summary.violations.prompts):
        assert f"{number(found.violations)} of {number(found.n)}" in first
        assert f"at most {percent(found.upper_95)}*" in first
    assert "beside delta_max 0.05" in first
    assert first.count("Kept") == 1


def test_thresholds_of_the_paper_and_of_the_criteria_are_named_in_the_tables(html: str) -> None:
    assert '<th scope="row">0.05 <small>paper, yours</small></th>' in html
    assert '<th scope="row">0.001 <small>paper</small></th>' in html
    assert '<th scope="row">0.002 <small>yours</small></th>' in html


def test_widths_of_the_bounds_stand_apart_by_grade_with_what_they_are_worth(html: str) -> None:
    for grade, sure in (("sketch", "at 95 % confidence"), ("interval", "rigorous")):
        _, _, table = html.partition(f"<h3>Width of the bounds ({grade})</h3>")
        assert sure in table.partition("<table>")[0]
        assert table.partition("</table>")[0].count("_width</th>") == 4


def test_the_ring_is_at_the_thresholds_of_the_criteria_where_they_are_of_these_divergences(html: str) -> None:
    assert "seq_max_kl up to 0.05 and seq_mean_kl up to 0.002 together" in html
    assert "seq_max_k2 up to 0.05 and seq_mean_k3 up to 0.001 together" in html


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Thresholds(), {}),
        (
            Thresholds(delta_max=0.1, max_of="tv"),
            dict.fromkeys(("seq_max_tv", "seq_max_tv_lower", "seq_max_tv_upper"), 0.1),
        ),
        (
            Thresholds(delta_max=0.1),
            {"seq_max_k2": 0.1, **{f"seq_max_{name}": 0.1 for name in KL}},
        ),
        (
            Thresholds(delta_avg=0.1, delta_total=2.0, avg_of="k3", total_of="kl"),
            {"seq_mean_k3": 0.1, **{f"seq_sum_{name}": 2 for name in KL}},
        ),
    ],
    ids=["none", "named", "by grade", "mean and total"],
)
def test_a_threshold_belongs_to_the_statistics_that_it_may_be_compared_with(
    limits: Thresholds, expected: dict[str, float]
) -> None:
    assert given_thresholds(limits) == expected


def test_versions_are_not_drawn_where_they_are_staleness_from_behind() -> None:
    fresh = [dataclasses.replace(category(s, 1e-4 * (1 + s), 0.5), n=40 + s) for s in (0, 10, 30)]
    versions = [dataclasses.replace(each, value=200 - int(each.value)) for each in reversed(fresh)]
    some = dataclasses.replace(small_summary(), by_staleness=fresh, by_policy_version=versions)
    ids = Page(render_html(some)).values("id")
    assert "figure-staleness" in ids
    assert "figure-version" not in ids
    alone = dataclasses.replace(some, by_staleness=[])
    assert "figure-version" in Page(render_html(alone)).values("id")
    more = dataclasses.replace(some, by_policy_version=versions[1:])
    assert "figure-version" in Page(render_html(more)).values("id")


def test_figures_of_a_single_length_and_of_all_or_nothing_are_left_out(summary: AuditSummary) -> None:
    one = AcceptanceByLength([4, 8, 16], [7, 0], [LengthCurve("seq_max_kl", 0.05, [1.0, None])])
    sharp = CombinedAcceptance("kl", "kl", 1, [0.001, 0.05, 1.0], [[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    ids = Page(render_html(dataclasses.replace(summary, acceptance_by_length=one, acceptance_combined=[sharp]))).values(
        "id"
    )
    assert not [name for name in ids if name in ("figure-length", "figure-combined-kl-kl")]
    assert "figure-acceptance-max" in ids


def test_what_is_kept_alike_at_every_length_is_said_once(summary: AuditSummary) -> None:
    flat, falling = LengthCurve("seq_max_kl", 0.05, [1.0, 1.0]), LengthCurve("seq_sum_kl", 0.5, [1.0, 0.25])
    some = dataclasses.replace(summary, acceptance_by_length=AcceptanceByLength([4, 8, 16], [7, 8], [flat, falling]))
    said = "From the shortest to the longest they keep: seq_max_kl 100 %; seq_sum_kl 100 % to 25 %."
    assert said in Page(render_html(some)).texts


def test_one_of_something_is_not_written_as_many() -> None:
    one = dataclasses.replace(small_summary(), counts=Counts(1, {"exact": 1}, {}, 1, 1, 0, 0, 0, 0, 0, 1))
    text = render_html(one)
    assert "1 policy token, 1 prompt<" in text
    assert "Sequence read" in text
    assert not re.search(r"\b1 (tokens|sequences|prompts)\b", text)


def test_an_outlined_token_stays_on_one_line_unless_it_is_long() -> None:
    short = dataclasses.replace(worst(1, "x"), response=[ShownToken(1, " for", 0.5, -1.0, -2.0)], start=260)
    long = dataclasses.replace(short, response=[ShownToken(1, " " * 40, 0.5, -1.0, -2.0)])
    assert '<mark class="short"><span' in render_html(dataclasses.replace(small_summary(), worst=[short]))
    assert "<mark><span" in render_html(dataclasses.replace(small_summary(), worst=[long]))


def test_a_users_matplotlib_settings_do_not_count(html: str, summary: AuditSummary) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path", "text.usetex": True}):
        assert render_html(summary) == html


def test_an_audit_of_nothing_has_a_page_without_empty_parts() -> None:
    page = Page(render_html(small_summary()))
    assert "No rollouts were read." in page.texts
    assert "figure" not in page.tags
    assert not {"Which delta?", "Show me", "Impulses"} & set(page.texts[page.texts.index("No rollouts were read.") :])
    assert "Warning" not in page.texts


@pytest.mark.parametrize("part", [0, 1])
def test_parts_that_are_empty_are_left_out(part: int) -> None:
    # GIVEN a summary without every second of its parts
    names = [f.name for f in dataclasses.fields(AuditSummary) if hasattr(small_summary(), f.name)]
    empty = {name: getattr(small_summary(), name) for name in names[part::2] if name not in ("counts", "thresholds")}
    page = Page(render_html(dataclasses.replace(full_summary(("x", "y", "z")), **empty)))
    # THEN the others are shown
    assert page.open == []
    assert 2 < page.tags.count("svg") < ALL_FIGURES
    assert ("Show me" in page.texts) == ("worst" not in empty)


def broken(value: Any, poison: float) -> Any:
    """The tree with `poison` for every float."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {
            f.name: broken(getattr(value, f.name), poison) for f in dataclasses.fields(value) if f.name != "edges"
        }
        return dataclasses.replace(value, **entries)
    if isinstance(value, list):
        return [broken(entry, poison) for entry in value]
    if isinstance(value, dict):
        return {key: broken(entry, poison) for key, entry in value.items()}
    return poison if isinstance(value, float) else value


@pytest.mark.parametrize("poison", [math.inf, math.nan, 0.0, 1e300], ids=str)
def test_no_value_breaks_a_figure_or_a_table(poison: float) -> None:
    page = Page(render_html(broken(full_summary(("x", "y", "z")), poison)))
    assert page.open == []
    assert "Show me" in page.texts


def test_distributions_of_one_value_of_zeros_and_of_infinities_can_be_shown() -> None:
    base = small_summary()
    one = dataclasses.replace(distribution(0.1, 100), edges=[0.5, 0.7], counts=[3])
    nothing = dataclasses.replace(one, edges=[], counts=[], num_zero=5, num_inf=2)
    page = Page(render_html(dataclasses.replace(base, distributions={"kl": one, "seq_max_kl": nothing})))
    assert page.values("id").count("figure-distribution-token") == 1
    assert "figure-distribution-seq_max" not in page.values("id")
    empty = ProbabilityDensity([0.0, 0.5, 1.0], [[0, 0], [0, 0]])
    assert "figure-probabilities" not in Page(render_html(dataclasses.replace(base, probabilities=empty))).values("id")


def test_the_farthest_cell_of_the_density_is_named() -> None:
    density = ProbabilityDensity([0.0, 0.1, 0.5, 1.0], [[5, 0, 2], [0, 9, 1], [0, 0, 7]])
    page = Page(render_html(dataclasses.replace(small_summary(), probabilities=density)))
    assert any("2 with rollout probability 0 to 0.1 and trainer probability 0.5 to 1." in text for text in page.texts)


def test_a_page_of_a_real_audit_says_what_the_summary_says() -> None:
    rng = np.random.default_rng(7)
    builder = SummaryBuilder(full_summary(("x", "y", "z")).thresholds)
    for grade in ("exact", "sketch", "interval", "sampled"):
        builder.add(score_batch(random_rows(rng, 60, grade)))
    summary = builder.finish()
    page = Page(render_html(summary))
    assert summary.verdict in page.texts
    assert page.open == []
    assert page.tags.count("svg") >= 8


def test_without_a_tokenizer_tokens_appear_as_their_ids() -> None:
    bare = dataclasses.replace(worst(1, "x"), response=[ShownToken(17, None, 0.5, -1.0, None)], start=260)
    page = Page(render_html(dataclasses.replace(small_summary(), worst=[bare])))
    assert "[17]" in page.texts
    assert "kl 0.5" in page.texts
    assert "id 17; kl 0.5; log-probability: rollout -1, trainer –" in page.values("title")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234567, "1,234,567"),
        (0.1234567, "0.1235"),
        (1.5e-7, "1.5e-7"),
        (123456.0, "1.235e5"),
        (0.0, "0"),
        (-0.5, "-0.5"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "–"),
        (None, "–"),
    ],
    ids=str,
)
def test_numbers_have_four_digits_and_counts_all(value: float | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.5, "50 %"),
        (0.41754, "41.75 %"),
        (1.0, "100 %"),
        (0.0, "0 %"),
        (0.99999, ">99.99 %"),
        (2.5e-6, "0.00025 %"),
        (None, "–"),
    ],
    ids=str,
)
def test_shares_are_per_cent_and_only_all_is_100(share: float | None, shown: str) -> None:
    assert percent(share) == shown


@pytest.mark.parametrize("at", range(len(SHADES)))
def test_shades_begin_at_their_edges(at: int) -> None:
    assert shade(SHADES[at]) == at + 1
    assert shade(np.nextafter(SHADES[at], 0)) == at


def test_what_has_no_value_has_no_shade() -> None:
    assert shade(None) == shade(math.nan) == shade(0.0) == 0
    assert shade(math.inf) == len(SHADES)


def test_text_is_cut_and_what_is_obeyed_is_written_out() -> None:
    assert visible("a\u202eb\x1b[0m") == "a<U+202E>b<U+001B>[0m"
    assert visible("x" * 5000) == "x" * 2000 + "…"
    assert visible_token(" a\n\tb") == " a⏎\n⇥b"
    assert visible_token("\ud800") == "<U+D800>"


def test_two_audits_stand_side_by_side(summary: AuditSummary) -> None:
    other = full_summary(("x", "y", "z"))
    other = dataclasses.replace(other, tokens={"kl": quantiles(0.01, 77)})
    differences = {
        "mean_kl": Difference(0.5, 0.25, -0.25, -0.375, -0.125, True, 100),
        "seq_max_kl_p99": Difference(1.5, math.inf, math.inf, math.nan, math.nan, False, 0),
    }
    comparison = Comparison(
        verdict="B is nearer.",
        notes=["Note."],
        name_a=HOSTILE[0],
        name_b=HOSTILE[4],
        differences=differences,
        a=summary,
        b=other,
    )
    text = render_comparison_html(comparison)
    page = Page(text)
    assert page.open == []
    assert visible(HOSTILE[0]) in page.texts
    assert visible(HOSTILE[4]) in page.texts
    assert "-0.375 to -0.125" in page.texts
    assert page.tags.count("svg") == 6
    assert len(page.values("id")) == len(set(page.values("id")))
    assert text.index("Differences with an interval") < text.index("<svg") < text.index("What was read")
    assert text == render_comparison_html(comparison)
    assert "script" not in page.tags
