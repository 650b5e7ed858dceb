"""bench/results/sketches/*.json -> bench/sketches.md: every figure of `sketch_accuracy` and `sketch_coverage`.

python -m bench.sketch_page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.results import table
from bench.sketch_accuracy import KL_DELTAS, SINGLE_LISTS, TV_DELTAS

HERE = Path(__file__).parent
PARTS = {
    "distance, one": ("distance of the tails", "one position"),
    "distance of 1 %, one": ("the same where the tail has 1 % or more", "one position"),
    "kl, one": ("KL between its bounds", "one position"),
    "tv, one": ("TV between its bounds", "one position"),
    "distance, all": ("distance of the tails", "a sequence"),
    "kl, all": ("KL between its bounds", "a sequence"),
    "tv, all": ("TV between its bounds", "a sequence"),
}


def render(accuracy: dict[str, Any], coverage: dict[str, Any]) -> str:
    """The whole page."""
    parts = [
        "# What sketches lose, and how often they are wrong",
        "Written by `python -m bench.sketch_page` from `bench/results/sketches/*.json`, which "
        "`python -m bench.sketch_accuracy ROLLOUTS CHECKPOINT` and `python -m bench.sketch_coverage ROLLOUTS "
        "CHECKPOINT` write. The truth is float64 over the whole vocabulary. What sketches are, and what follows from "
        "these figures, is in [docs/sketches.md](../docs/sketches.md).",
        _machine(accuracy["machine"]),
        "## Accuracy",
        f"Evidence as `trm_audit.record` makes it, seed 1, bounds at {accuracy['confidence']:.0%} for all positions "
        "of a sequence together. Bytes are those of zstd Parquet columns, with the sampled token's log-probability "
        "and the entropy.",
    ]
    for one in accuracy["sets"]:
        parts += [_set(one), _grid(one["grid"], one["sequences"], one["tokens"])]
    parts += ["### Log-probabilities of the list as float16 and as float32", _precision(accuracy["sets"])]
    parts += ["## Coverage", _covered(coverage), _coverage(coverage["coverage"])]
    parts += ["## Bias of hellinger2", _bias(coverage["bias"])]
    parts += ["## Error against m", _errors(coverage["errors"])]
    return "\n\n".join(parts) + "\n"


def _machine(at: dict[str, Any]) -> str:
    return f"{at['cpu']}; Python {at['python']}, torch {at['torch']}, pyarrow {at['pyarrow']}."


def _set(one: dict[str, Any]) -> str:
    return (
        f"### {one['name']}\n\n{one['sequences']} sequences, {one['tokens']:,} tokens, V = {one['vocab_size']:,}. "
        f"KL per token: mean {one['kl']['mean']:.2g}, largest {one['kl']['max']:.2g}; TV: mean "
        f"{one['tv']['mean']:.2g}, largest {one['tv']['max']:.2g}."
    )


def _grid(lines: list[dict[str, Any]], sequences: int, tokens: int) -> str:
    head = [
        "K, m",
        "bytes a token",
        f"verdicts of the estimate that differ, max KL {_slashes(KL_DELTAS)}",
        "estimate / exact, a sequence's max",
        "TV upper / exact, a sequence's max, median",
        f"undecided at max TV {_slashes(TV_DELTAS)}",
        f"undecided at max KL {_slashes(KL_DELTAS)}",
        "sequences whose distance missed",
        "positions where a bound of KL or TV does not hold",
    ]
    rows = [
        [
            f"{one['k']}, {one['m']}",
            f"{_bytes(one):.0f}",
            _slashes(one["differ"]),
            "{:.2f}-{:.2f}".format(*one["estimate"]),
            f"{one['tv_upper']:.3f}",
            _slashes(f"{share:.2f}" for share in one["tv_undecided"]),
            _slashes(f"{share:.2f}" for share in one["kl_undecided"]),
            f"{one['distance_missed']} of {sequences}",
            f"{one['violated']} of {tokens:,}",
        ]
        for one in lines
    ]
    return table(head, rows)


def _bytes(one: dict[str, Any]) -> float:
    return float(sum(size for name, size in one["bytes"].items() if name != SINGLE_LISTS))


def _slashes(values: Any) -> str:
    return " / ".join(str(one) for one in values)


def _precision(sets: list[dict[str, Any]]) -> str:
    head = ["data", "K, m", "bytes of the list", "TV upper / exact, median", "KL upper - lower over exact, median"]
    rows = [
        [
            one["name"],
            f"{line['k']}, {line['m']}",
            f"{line['bytes']['rollout_topk_logprobs']:.0f}, {line['bytes'][SINGLE_LISTS]:.0f}",
            f"{line['tv_upper']:.3f}, {line['tv_upper_single']:.3f}",
            f"{line['kl_width']:.3f}, {line['kl_width_single']:.3f}",
        ]
        for one in sets
        for line in one["grid"]
    ]
    return table(head, rows)


def _covered(run: dict[str, Any]) -> str:
    return (
        f"K = {run['k']}; {run['sequences']} sequences of {run['positions']} positions each, half of them from the "
        f"folder, half sampled from the checkpoint under noise; each seed is an independent draw of R. Confidence "
        f"{run['confidence']:.0%}: of one position by itself, and of all positions of a sequence. The most at one "
        "place is to be compared with the number beside it, which a binomial of the nominal share exceeds somewhere "
        "once in a hundred times. Two things make misses of the distance rarer than nominal: differences of few tokens "
        "spread less than the chi-square, and the limits allow for float16. Misses of one draw come together, so "
        "shares have standard errors over seeds."
    )


def _coverage(runs: list[dict[str, Any]]) -> str:
    head = ["m", "seeds", "what", "confidence of", "share missed", "most at one place", "allowed"]
    rows = [
        [
            str(one["m"]),
            str(one["seeds"]),
            words,
            over,
            "{share:.4f} ± {error:.4f}".format(**one[name]),
            str(one[name]["most"]),
            str(one[name]["allowed"]),
        ]
        for one in runs
        for name, (words, over) in PARTS.items()
    ]
    return table(head, rows)


def _bias(runs: dict[str, dict[str, float]]) -> str:
    head = ["m", "seeds", "mean of estimate / truth - 1", "z", "largest z of a tail's distance", "of"]
    rows = [
        [
            m,
            str(one["seeds"]),
            f"{one['mean']:+.5f} ± {one['error']:.5f}",
            f"{one['z']:+.2f}",
            f"{one['largest_z']:.2f}",
            f"{one['positions']} positions",
        ]
        for m, one in runs.items()
    ]
    return table(head, rows)


def _errors(run: dict[str, Any]) -> str:
    sizes = list(run["seeds"])
    head = ["relative error (root mean square over positions)", "exponent of m", *(f"m = {m}" for m in sizes)]
    rows = [["sqrt(2/m)", "-0.5", *(f"{(2 / int(m)) ** 0.5:.4f}" for m in sizes)]]
    for name, words in {"tails": "distance of the tails", "hellinger2": "hellinger2, whose list is exact"}.items():
        one = run[name]
        exponent = f"{one['exponent']:.3f} ± {one['exponent_error']:.3f}"
        rows.append([words, exponent, *(f"{one['error'][m]:.4f}" for m in sizes)])
    return table(head, rows)


def write(folder: Path = HERE) -> None:
    """Renders `sketches.md` of a folder from its `results/sketches/`."""
    found = [json.loads((folder / "results" / "sketches" / f"{name}.json").read_text("utf-8")) for name in
             ("accuracy", "coverage")]  # fmt: skip
    (folder / "sketches.md").write_text(render(*found), "utf-8")


if __name__ == "__main__":
    write()
