"""The report in GitHub's Markdown, short enough for a pull request: the verdict, the warnings, the main figures.

Whatever comes from the data is hostile until shown otherwise: it must not become markup, a table's border, a link, a
formula, a mention or a reference to an issue. Names stand in code spans (`code`, in tables `cell`); sentences, which
may quote names, have their punctuation escaped (`prose`). All are cut: the text stays under 10 KB and 60 lines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence

from trm_audit.report.compare import Comparison
from trm_audit.report.deltas import MARKED
from trm_audit.report.noise import AGAINST
from trm_audit.report.shown import number, percent, visible
from trm_audit.report.summary import AuditSummary

SHOWN_WARNINGS = 5
SHOWN_DELTAS = 4
SHOWN_CATEGORIES = 8
SHOWN_WORST = 3
SHOWN_REASONS = 5
SHOWN_DIFFERENCES = 18
SHOWN_NOTES = 9

_NAME_BYTES = 160
_SENTENCE_BYTES = 600
_INVISIBLE = "&#8203;"  # a zero-width space, which ends what would be a mention, a reference or an address
_APART = {"@": f"@{_INVISIBLE}", "#": f"#{_INVISIBLE}", "$": "&#36;", "//": f"/{_INVISIBLE}/"}
_MEANINGFUL = re.compile(
    r"[\\`*\[\]{}|~!&$@#]"
    r"|[<>](?![ =])"  # not the sign of a comparison
    r"|(?<![^\W_])_|_(?![^\W_])"  # not within a word
    r"|(?<=:)//|\b(?:www(?=\.)|gh(?=-\d))",
    re.IGNORECASE,
)
_AT_LINE_START = re.compile(r"^(\d{0,9})([-+=>.)])")
_NOT_EXHAUSTIVE = (
    "Bounds are plug-in estimates: they rest on the contexts that were sampled. Everything else is in the full report."
)


def render_markdown(found: AuditSummary | Comparison) -> str:
    """A summary or a comparison as Markdown with a line break at its end; at most 60 lines and 10 KB."""
    blocks = _comparison(found) if isinstance(found, Comparison) else _summary(found)
    return "\n\n".join("\n".join(lines) for lines in blocks if lines) + "\n"


def code(text: str) -> str:
    """A name from the data as a code span, in which nothing has a meaning; not for tables, where `|` has one."""
    return _fitting(text, _code_span, _NAME_BYTES)


def cell(text: str) -> str:
    """As `code`, for a table: `|`, which ends a cell even within a code span, is shown as a broken bar."""
    return code(text.replace("|", "¦"))


def prose(text: str) -> str:
    """A sentence that may quote names from the data, as text without any markup."""
    return _fitting(text, _escaped, _SENTENCE_BYTES)


def _fitting(text: str, form: Callable[[str], str], size: int) -> str:
    """`text` on one line, formed, and cut until it has at most `size` bytes."""
    shown = " ".join(visible(text[:size]).split()) or "-"
    cut, mark = len(text) > size, "…"
    while len((formed := form(shown + mark * cut)).encode()) > size:
        shown, cut = shown[: len(shown) * 9 // 10], True
    return formed


def _code_span(text: str) -> str:
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _escaped(text: str) -> str:
    """Backslashes before what Markdown reads, zero-width spaces in what GitHub turns into links."""
    return _AT_LINE_START.sub(r"\1\\\2", _MEANINGFUL.sub(lambda found: _harmless(found[0]), text))


def _harmless(found: str) -> str:
    return _APART.get(found) or (f"{found}{_INVISIBLE}" if found.isalpha() else f"\\{found}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells are taken as they are; no lines without rows."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)] if rows else []


def _summary(summary: AuditSummary) -> Iterator[list[str]]:
    yield ["### trm-audit report"]
    yield [f"**{prose(summary.verdict)}**"]
    yield [prose(summary.evidence)] if summary.evidence else []
    yield _listed("Warnings", [finding.sentence for finding in summary.warnings], SHOWN_WARNINGS)
    yield _table(["", "value", "95 % interval"], [*_decision(summary), *_metrics(summary), *_bounds(summary)])
    yield _reasons(summary)
    yield _table(["at delta", "kept", "tokens kept", "mean reward kept"], _marked(summary))
    yield _targets(summary)
    yield _by_staleness(summary)
    yield _worst(summary)
    yield _worth(summary)
    yield [_NOT_EXHAUSTIVE]


def _listed(title: str, sentences: Sequence[str], most: int) -> list[str]:
    more = [f"- {len(sentences) - most} more in the full report."] * (len(sentences) > most)
    return [f"**{title}**", "", *(f"- {prose(each)}" for each in sentences[:most]), *more] if sentences else []


def _decision(summary: AuditSummary) -> Iterator[list[str]]:
    counts = summary.counts
    grades = [f"{count:,} {cell(grade)}" for grade, count in [*counts.grades.items()][:4]]
    yield ["sequences (N)", f"{counts.n_total:,} ({', '.join(grades)})" if grades else f"{counts.n_total:,}", ""]
    if summary.n_kept is not None:
        yield ["kept", f"{summary.n_kept:,} ({percent(summary.acceptance)})", ""]
    found = summary.violations
    for unit, share in (("sequences", found.sequences), ("prompts", found.prompts)) if found else ():
        if found is not None and share is not None:
            name = f"{unit} above delta_max = {found.delta_max:g} by {prose(found.divergence.replace('|', '¦'))}"
            yield [name, f"{share.violations:,} ({percent(share.share)})", f"at most {percent(share.upper_95)}"]
    for against in AGAINST if summary.noise_floor is not None else ():
        noise = getattr(summary.noise_floor, against)
        if noise is not None:
            yield [
                f"noise floor of kl, {AGAINST[against]}",
                f"{number(noise.kl.mean)}, max {number(noise.kl.max)}",
                "",
            ]


def _metrics(summary: AuditSummary) -> Iterator[list[str]]:
    for name, metric in summary.main_metrics().items():
        yield [cell(name), number(metric.value), _interval(metric.low, metric.high)]


def _bounds(summary: AuditSummary) -> Iterator[list[str]]:
    """The smallest bound of each kind of evidence that is the best of some row."""
    for block in (blocks[0] for blocks in summary.main_bounds().values()):
        least = block.bounds[block.minimum]
        label = f"smallest bound, {cell(block.minimum)}, T = {block.horizon}"
        yield [label, f"{number(least.published)} published, {number(least.sharp)} sharp", ""]


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low + high) else f"{number(low)} to {number(high)}"


def _reasons(summary: AuditSummary) -> list[str]:
    """Why sequences were rejected, on one line."""
    shown = [f"{count:,} {code(cause)}" for cause, count in [*summary.reasons.items()][:SHOWN_REASONS]]
    more = [f"{len(summary.reasons) - SHOWN_REASONS} more causes"] * (len(summary.reasons) > SHOWN_REASONS)
    return [f"Rejected: {', '.join(shown + more)}."] if shown else []


def _marked(summary: AuditSummary) -> list[list[str]]:
    """What the thresholds that the paper uses would keep."""
    rows = [
        [
            f"{cell(name)} ≤ {row.delta:g}",
            *map(percent, (row.share_kept, row.share_tokens_kept)),
            number(row.mean_reward_kept),
        ]
        for name, table in summary.delta_tables.items()
        for row in table.rows
        if row.delta in table.marked
    ]
    return rows[:SHOWN_DELTAS]


def _targets(summary: AuditSummary) -> list[str]:
    """The thresholds for the acceptance that was asked for, on the statistics that the paper's criteria are on."""
    rows = [
        [cell(each.statistic), number(each.delta), percent(each.share_kept)]
        for each in summary.targets
        if each.statistic in MARKED
    ]
    return _table([f"to keep {percent(summary.targets[0].target)}", "delta", "keeps"], rows) if rows else []


def _by_staleness(summary: AuditSummary) -> list[str]:
    found = summary.by_staleness
    name = next(
        (d for d in ("kl", "kl_estimate", "kl_upper", "k3", "k2") if any(d in each.divergences for each in found)), "k3"
    )
    rows = []
    for each in found[:SHOWN_CATEGORIES]:
        spread = each.divergences.get(name)
        figures = ["-", "-"] if spread is None else [number(spread.mean), number(spread.max)]
        rows.append([cell(str(each.value)), f"{each.n:,}", percent(each.acceptance), *figures])
    more = f" ({len(found) - SHOWN_CATEGORIES} more)" if len(found) > SHOWN_CATEGORIES else ""
    return _table([f"staleness{more}", "n", "kept", f"mean {cell(name)}", f"max {cell(name)}"], rows)


def _worst(summary: AuditSummary) -> list[str]:
    rows = []
    for each in summary.worst[:SHOWN_WORST]:
        group = "" if each.group_id is None else f" of group {code(each.group_id)}"
        where = f"at token {number(each.position)} of {each.response_length}"
        rows.append(f"- {code(each.rollout_id)}{group}: {code(each.statistic)} {number(each.value)} {where}")
    return ["**Worst sequences**", "", *rows] if rows else []


def _worth(summary: AuditSummary) -> list[str]:
    """What other evidence would have decided."""
    found = summary.evidence_worth
    return [] if found is None else [prose(f"{found.sentence} {found.basis}")]


def _comparison(found: Comparison) -> Iterator[list[str]]:
    yield ["### trm-audit report, A against B"]
    yield [f"**{prose(found.verdict)}**"]
    yield [f"- A: {code(found.name_a)}", f"- B: {code(found.name_b)}"]
    yield _listed("Before you compare", found.notes, SHOWN_NOTES)
    yield _table(["", "A", "B", "B - A", "95 % interval"], _differences(found))
    yield [_NOT_EXHAUSTIVE]


def _differences(found: Comparison) -> list[list[str]]:
    drawn, rest = found.shown()
    return [
        [cell(name), *map(number, (each.a, each.b, each.difference)), _interval(each.low, each.high)]
        for name, each in [*drawn.items(), *rest.items()][:SHOWN_DIFFERENCES]
    ]
