"""bench/results/*.json -> bench/RESULTS.md: every figure, every ratio with its aim beside it, and reasons.md as it is.

python -m bench.results
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

LETTERS = {"padded": "(a) padded", "padded-kl": "(a') padded, KL alone", "packed": "(b) packed"}
RATIOS = tuple(LETTERS)
WITHOUT = {
    "ours-packed": "sharing (packed)",
    "ours-padded": "sharing and packing (padded)",
    "ours-torch": "compiled kernels",
    "ours-no-read-ahead": "read-ahead",
}

CPU, GPU = "cpu", "cuda"
AIMS: dict[tuple[str, str, str], dict[str, float]] = {
    (CPU, "padded", "full"): {"W1": 9, "W2": 8, "W3": 11, "W4": 9},
    (CPU, "padded-kl", "full"): {"W1": 5, "W2": 5, "W3": 8, "W4": 7},
    (CPU, "packed", "full"): {"W1": 3, "W6": 1},
    (CPU, "packed", "top64"): {"W6": 1},
    (CPU, "packed", "sampled"): {"W6": 1},
    (GPU, "padded", "full"): {"W2": 4, "W3": 9, "W4": 7},
    (GPU, "padded", "sampled"): {"W2": 4, "W3": 9, "W4": 7},
    (GPU, "packed", "full"): {"W2": 2.3, "W3": 7, "W6": 1},
    (GPU, "packed", "top64"): {"W6": 1},
    (GPU, "packed", "sampled"): {"W2": 2.3, "W3": 7, "W6": 1},
}
"""Ours over an arm, (kind of device, arm, mode) -> workload -> how many times faster. The aims for CPUs were set for
two AVX512-bf16 cores and SmolLM2-135M in bf16, those for GPUs for one H200 and 7B shapes."""
OF_LIMIT = {(CPU, "full"): 0.8, (GPU, "sampled"): 0.8, (GPU, "full"): 0.9}
MEMORY_AIM = ("W2", 4e9)
"""Peak of ours above the weights on a CPU, for vocabularies up to 152k."""


def render(runs: Iterable[dict[str, Any]], reasons: str) -> str:
    """The whole page. runs: parsed JSON files; reasons: Markdown, kept as it is."""
    parts = [
        "# Speed and memory of scoring",
        "Written by `python -m bench.results` from `bench/results/*.json`; only the section of reasons is written by "
        "hand (`bench/reasons.md`). Arms, rounds and the limit are described in the docstrings of `bench/`. Every "
        "ratio is one of medians of interleaved rounds in one process; an arm has a time only if its figures agree "
        "with the reference. In brackets: the aim, where there is one.",
        reasons.strip(),
    ]
    for run in runs:
        parts += section(run)
    return "\n\n".join(part for part in parts if part) + "\n"


def section(run: dict[str, Any]) -> list[str]:
    """Paragraphs of one run."""
    cells = run["cells"]
    return [
        f"## {run['title']}",
        _described(run),
        "### Response tokens per second",
        _speeds(cells),
        "### Ours over the others, and how much of the limit",
        _ratios(cells, run["device"]),
        _section("### What each part is worth (time without it, over time with it)", _ablations(cells)),
        "### Peak memory above the weights, MB",
        _memory(cells, run["device"]),
        "### Largest (mean) difference of log-probabilities and of KL from the reference",
        _deviations(cells),
        _section("### Not measured", _failures(cells)),
    ]


def _section(head: str, body: str) -> str:
    return f"{head}\n\n{body}" if body else ""


def _described(run: dict[str, Any]) -> str:
    at = run["machine"]
    where = f"{at['gpu']}, " if at["gpu"] else ""
    flags = ", ".join(at["flags"]) or "no flags that matter"
    lines = [
        f"- {where}{at['cpu']}, {at['cores']} cores ({flags}), {at['threads']} threads, {at['memory_gib']} GiB; "
        f"Python {at['python']}, torch {at['torch']}, transformers {at['transformers']}, pyarrow {at['pyarrow']}",
        f"- {run['model']}, {run['dtype']}, sharing: {run['sharing']}; {run['rounds']} rounds after {run['warm_up']}, "
        f"seed {run['seed']}, {run['groups']} group(s); {run['files']}",
    ]
    rates = run["rates"]
    pcie = f", PCIe {rates['transfer'] / 1e9:.1f} GB/s" if rates["transfer"] else ""
    lines.append(
        f"- matrix products: layers {rates['layers'] / 1e9:,.0f} GFLOP/s, head {rates['head'] / 1e9:,.0f}; copy "
        f"{rates['copy'] / 1e9:.1f} GB/s{pcie}"
    )
    return "\n".join(lines)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; the first two columns to the left."""
    rule = ["---"] * 2 + ["---:"] * (len(head) - 2)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _arms(cells: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell["arms"]))


def _seconds(cell: dict[str, Any], arm: str) -> float | None:
    timing = cell["arms"].get(arm)
    return timing["median"] if timing else None


def _speeds(cells: list[dict[str, Any]]) -> str:
    arms = _arms(cells)
    rows = []
    for cell in cells:
        n = cell["work"]["response_tokens"]
        speeds = [_speed(n, _seconds(cell, arm)) for arm in arms]
        shape = f"{cell['work']['rows']} x {n / cell['work']['rows']:.0f}"
        rows.append([_name(cell), cell["mode"], shape, *speeds, _speed(n, cell["limit"]["seconds"])])
    return table(["workload", "mode", "rows x mean response", *arms, "(c) limit"], rows)


def _speed(tokens: int, seconds: float | None) -> str:
    return "–" if not seconds else f"{tokens / seconds:,.0f}"


def _name(cell: dict[str, Any]) -> str:
    return f"{cell['workload']} at {cell['scale']:g}"


def _ratios(cells: list[dict[str, Any]], device: str) -> str:
    rows = []
    for cell in cells:
        ours = _seconds(cell, "ours")
        row = [_name(cell), cell["mode"]]
        for arm in RATIOS:
            other = _seconds(cell, arm)
            aim = AIMS.get((device, arm, cell["mode"]), {}).get(cell["workload"])
            row.append(_ratio(other / ours if ours and other else None, aim, "{:.2f}"))
        aim = OF_LIMIT.get((device, cell["mode"]))
        row.append(_ratio(cell["limit"]["seconds"] / ours if ours else None, aim, "{:.0%}"))
        parts = {name: value for name, value in cell["limit"].items() if name != "seconds"}
        rows.append([*row, max(parts, key=lambda name: parts[name])])
    return table(["workload", "mode", *LETTERS.values(), "of (c) limit", "limit set by"], rows)


def _ratio(value: float | None, aim: float | None, form: str) -> str:
    shown = "–" if value is None else form.format(value)
    return shown if aim is None else f"{shown} ({form.replace('.2f', 'g').format(aim)})"


def _ablations(cells: list[dict[str, Any]]) -> str:
    arms = [arm for arm in WITHOUT if any(_seconds(cell, arm) for cell in cells)]
    rows = []
    for cell in cells:
        ours = _seconds(cell, "ours")
        if ours and any(_seconds(cell, arm) for arm in arms):
            others = [_seconds(cell, arm) for arm in arms]
            rows.append([_name(cell), cell["mode"], *(f"{t / ours:.2f}" if t else "–" for t in others)])
    return table(["workload", "mode", *(WITHOUT[arm] for arm in arms)], rows) if rows else ""


def _memory(cells: list[dict[str, Any]], device: str) -> str:
    arms = _arms(cells)
    rows = []
    for cell in cells:
        row = [_name(cell), cell["mode"]]
        for arm in arms:
            peak = cell["arms"].get(arm, {}).get("peak_bytes")
            shown = "–" if peak is None else f"{peak / 1e6:,.0f}"
            aimed = arm == "ours" and device == CPU and cell["workload"] == MEMORY_AIM[0] and cell["scale"] == 1
            row.append(f"{shown} ({MEMORY_AIM[1] / 1e6:,.0f})" if aimed else shown)
        rows.append(row)
    return table(["workload", "mode", *arms], rows)


def _deviations(cells: list[dict[str, Any]]) -> str:
    arms = _arms(cells)
    rows = []
    for cell in cells:
        row = [_name(cell), cell["mode"]]
        for arm in arms:
            off = cell["arms"].get(arm, {}).get("deviation") or {}
            shown = [off[name] for name in ("trainer_logprobs", "kl", "bucketed_kl") if name in off]
            row.append("; ".join(f"{largest:.0e} ({mean:.0e})" for largest, mean in shown) or "–")
        rows.append(row)
    return table(["workload", "mode", *arms], rows)


def _failures(cells: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"- {_name(cell)}, {cell['mode']}, {arm}: {timing['failed']}"
        for cell in cells
        for arm, timing in cell["arms"].items()
        if timing["failed"]
    )


def write(folder: Path = HERE) -> None:
    """Renders `RESULTS.md` of a folder from its `results/*.json` and `reasons.md`."""
    runs = [json.loads(file.read_text("utf-8")) for file in sorted((folder / "results").glob("*.json"))]
    reasons = folder / "reasons.md"
    page = render(runs, reasons.read_text("utf-8") if reasons.exists() else "")
    (folder / "RESULTS.md").write_text(page, "utf-8")


if __name__ == "__main__":
    write()
