"""What other evidence would decide: measured as scoring begins, as a loop over really packed rollouts counts it."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Run, make_checkpoint
from report_rows import random_rows, run_with_floor, score_batch, worth_of
from some_rollouts import VOCAB, log_softmax, rollout, write_shard, write_shards

from trm_audit.engine.packing import Target
from trm_audit.engine.worth import DELTAS, MOST_TOKENS, bounds_of_kinds, certain, fair_cut
from trm_audit.errors import BadInput
from trm_audit.pipeline.pack import pack
from trm_audit.pipeline.pack_options import PackOptions
from trm_audit.pipeline.score import ScoreOptions, score
from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.summary import Thresholds
from trm_audit.report.worth import evidence_worth

KINDS = ("topk:8", "topk:20", "sketch:20,64")
"""Those of a vocabulary of 32."""


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose distributions have a few likely tokens, and tails."""
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(tmp_path_factory.mktemp("sharp") / "model", VOCAB)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight *= 10
    model.save_pretrained(folder)
    return folder


def near(model: Path, index: int, **more: Any) -> dict[str, Any]:
    """A rollout with full logits near to the model's own: some positions nearer than others."""
    row = rollout(index, "exact", length=4 + index % 5, **more)
    rng = np.random.default_rng([index, 7])
    spread = 10.0 ** rng.uniform(-3, 0, (len(row["response_ids"]), 1))
    row["logits"] = (trainer_logits(model, row) + spread * rng.standard_normal((len(spread), VOCAB))).astype(np.float32)
    row["rollout_logprobs"] = None
    return row


def trainer_logits(model: Path, row: dict[str, Any]) -> np.ndarray:
    """[T, V] float64, from transformers alone."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
    with torch.no_grad():
        logits: np.ndarray = loaded(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].numpy()
    return logits


def worths(folder: Path) -> list[dict[str, Any] | None]:
    """Of the run, and of each shard's footer."""
    footers = [pq.read_metadata(file).metadata[b"trm_audit.run"] for file in sorted((folder / "data").iterdir())]
    runs = [json.loads((folder / "run.json").read_text()), *map(json.loads, footers)]
    return [run.get("evidence_worth") for run in runs]


def by_loop(rows: list[list[tuple[float, float]]]) -> tuple[list[int], list[int]]:
    """Certain verdicts at each delta: of positions, of sequences. rows: lower and upper bounds by sequence."""
    positions, sequences = [], []
    for delta in DELTAS:
        num_positions = num_sequences = 0
        for row in rows:
            for lower, upper in row:
                num_positions += 1 if upper <= delta or lower > delta else 0
            largest_lower, largest_upper = max(lower for lower, _ in row), max(upper for _, upper in row)
            num_sequences += 1 if largest_upper <= delta or largest_lower > delta else 0
        positions.append(num_positions)
        sequences.append(num_sequences)
    return positions, sequences


def test_certain_verdicts_are_those_of_a_loop_equality_counts_and_what_is_not_known_decides_nothing() -> None:
    rng = np.random.default_rng(0)
    lower = [10.0 ** rng.uniform(-5, 1, n) for n in (1, 4, 9, 30)]
    rows = [np.stack([low, low * 10.0 ** rng.uniform(0, 1, len(low))]) for low in lower]
    rows.append(np.array([[0.0, 0.05], [0.05, 0.05]]))  # 0.05 is at most 0.05, and not above it
    rows.append(np.array([[0.0, np.inf], [np.inf, np.inf]]))
    found = certain(rows)
    assert (found.positions, found.sequences) == by_loop([list(zip(*row.tolist(), strict=True)) for row in rows])
    assert 0 < min(found.sequences) < max(found.sequences)
    assert max(found.positions) < sum(row.shape[1] for row in rows)
    unknown = certain([np.full((2, 3), np.nan), np.zeros((2, 1))])
    assert unknown.positions == unknown.sequences == [1] * len(DELTAS)


def test_long_rollouts_are_cut_alike_until_they_fit() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        lengths, most = rng.integers(1, 40, int(rng.integers(1, 12))).tolist(), int(rng.integers(12, 200))
        cut = fair_cut(lengths, most)
        assert sum(min(length, cut) for length in lengths) <= most
        assert cut == max(lengths) or sum(min(length, cut + 1) for length in lengths) > most
    assert fair_cut([2, 9, 9], 10) == 4
    assert fair_cut([9, 9, 9], 2) == 1  # one token of each is the least


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 24}], ids=["plain", "tempered"])
def test_it_counts_what_scores_of_really_packed_rollouts_say(sharp: Path, tmp_path: Path, sampling: Any) -> None:
    # GIVEN rollouts with full logits, scored
    rows = [near(sharp, i, logprobs_mode="raw", **sampling) for i in range(8)]
    write_shard(tmp_path / "rollouts" / "a.parquet", rows)
    options = ScoreOptions(model=sharp, confidence=0.9)
    score([str(tmp_path / "rollouts")], str(tmp_path / "scores"), options)
    found = worths(tmp_path / "scores")[0]
    assert found is not None
    assert (found["num_rollouts"], found["num_exact"], found["num_cut"]) == (8, 8, 0)
    assert found["num_tokens"] == sum(len(row["response_ids"]) for row in rows)
    assert set(found["kinds"]) == set(KINDS)
    # WHEN they are packed to each kind of evidence, and that is scored
    for name, kind in found["kinds"].items():
        folder = tmp_path / name.replace(":", "-")
        pack([str(tmp_path / "rollouts")], str(folder), PackOptions(to=Target.parse(name)))
        score([str(folder)], f"{folder}-scores", replace(options, noise_floor=0.0))
        scores = pq.read_table(f"{folder}-scores/data").to_pydict()
        # THEN a loop over its bounds counts the same certain verdicts
        for divergence in ("kl", "tv"):
            bounds = [
                list(zip(*each, strict=True))
                for each in zip(scores[f"{divergence}_lower"], scores[f"{divergence}_upper"], strict=True)
            ]
            expected = by_loop(bounds)
            assert (kind[divergence]["positions"], kind[divergence]["sequences"]) == expected, name
            assert 0 < sum(expected[0]) < len(DELTAS) * found["num_tokens"]
        k, *dim = map(int, name.partition(":")[2].split(","))
        assert kind["bytes_per_token"] == 6 * k + (2 * dim[0] + 12 if dim else 0)


def test_without_pi_roll_the_trainers_distribution_stands_in_for_it(sharp: Path, tmp_path: Path) -> None:
    # GIVEN rollouts of which only the sampled tokens are known, one of them with tool tokens
    rows = [rollout(i, length=3 + i) for i in range(6)]
    rows[5]["response_mask"] = [t % 3 != 0 for t in range(8)]
    write_shard(tmp_path / "rollouts" / "a.parquet", rows)
    score([str(tmp_path / "rollouts")], str(tmp_path / "scores"), ScoreOptions(model=sharp))
    found = worths(tmp_path / "scores")[0]
    assert found is not None
    assert (found["num_rollouts"], found["num_exact"]) == (6, 0)
    # WHEN both policies are the trainer's, TV from a list is at most the mass outside of it: a loop in float64
    outside = []
    for row in rows:
        for t, logp in enumerate(log_softmax(trainer_logits(sharp, row))):
            if row.get("response_mask", [True] * 99)[t]:
                known = {*sorted(range(VOCAB), key=lambda token, p=logp: -p[token])[:8], row["response_ids"][t]}
                outside.append(sum(math.exp(logp[token]) for token in range(VOCAB) if token not in known))
    assert found["num_tokens"] == len(outside)
    # THEN those of at most delta are certain, but for what rounding of the list to float16 adds
    counts = found["kinds"]["topk:8"]["tv"]["positions"]
    for count, delta in zip(counts, DELTAS, strict=True):
        assert sum(r + 0.004 <= delta for r in outside) <= count <= sum(r <= delta for r in outside)
    assert counts[DELTAS.index(0.2)] < len(outside) == counts[DELTAS.index(0.5)]


def test_bounds_hold_and_a_list_of_almost_all_tokens_knows_almost_all() -> None:
    rng = torch.Generator().manual_seed(3)
    rollout_logits = 4 * torch.randn(50, 300, generator=rng)
    trainer = rollout_logits + 0.2 * torch.randn(50, 300, generator=rng)
    ids = torch.randint(300, (50,), generator=rng)
    p, q = (logits.double().log_softmax(1) for logits in (rollout_logits, trainer))
    kl, tv = (p.exp() * (p - q)).sum(1).numpy(), ((p.exp() - q.exp()).abs().sum(1) / 2).numpy()
    found = bounds_of_kinds(rollout_logits, trainer, ids, 50, 0.95)
    assert list(found) == ["topk:8", "topk:20", "topk:64", "topk:256", "sketch:20,64"]
    for kl_lower, kl_upper, tv_lower, tv_upper in found.values():
        assert (kl_lower <= kl).all() and (kl <= kl_upper).all()  # noqa: PT018
        assert (tv_lower <= tv).all() and (tv <= tv_upper).all()  # noqa: PT018
    widths = [(upper - lower).mean() for lower, upper in (found[f"topk:{k}"][:2] for k in (8, 20, 64, 256))]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.03 < 0.3 < widths[0]


def test_of_long_rollouts_the_first_tokens_are_looked_at_and_some_are_exact(checkpoint: Path, tmp_path: Path) -> None:
    rows = [rollout(i, "exact" if i % 2 else "sampled", length=100 if i else 5) for i in range(8)]
    write_shard(tmp_path / "rollouts" / "a.parquet", rows)
    score([str(tmp_path / "rollouts")], str(tmp_path / "scores"), ScoreOptions(model=checkpoint))
    found = worths(tmp_path / "scores")[0]
    assert found is not None
    assert (found["num_rollouts"], found["num_exact"], found["num_cut"]) == (8, 4, 7)
    # a sketch of what stands in for pi_roll would show no distance
    assert set(found["kinds"]) == {"topk:8", "topk:20"}
    assert found["num_tokens"] == 5 + 7 * ((MOST_TOKENS["cpu"] - 5) // 7)


def test_figures_stand_with_every_shard_and_do_not_tell_runs_apart(checkpoint: Path, tmp_path: Path) -> None:
    # GIVEN a scored data set of which a shard is lost
    write_shards(tmp_path / "rollouts", 3, 4)
    options = ScoreOptions(model=checkpoint)
    assert score([str(tmp_path / "rollouts")], str(tmp_path / "out"), options).complete
    run, *footers = worths(tmp_path / "out")
    assert run is not None
    assert footers == [run] * 3
    assert run["num_rollouts"] == 8
    (tmp_path / "out" / "data" / "part-1.parquet").unlink()
    # WHEN the run goes on without measuring anything
    result = score([str(tmp_path / "rollouts")], str(tmp_path / "out"), replace(options, noise_floor=0.0))
    # THEN it is the same run, and the shard made again says that nothing was measured
    assert (result.complete, result.done, result.shards) == (True, 2, 1)
    assert worths(tmp_path / "out") == [run, run, None, run]
    assert pq.read_table(tmp_path / "out" / "data").num_rows == 12


def test_nothing_is_said_without_a_model_without_policy_tokens_and_where_it_is_not_wanted(
    checkpoint: Path, sampled_scores: Path, tmp_path: Path
) -> None:
    assert set(map(str, worths(sampled_scores))) == {"None"}
    write_shards(tmp_path / "rollouts", 1, 4)
    score([str(tmp_path / "rollouts")], str(tmp_path / "off"), ScoreOptions(model=checkpoint, noise_floor=0.0))
    write_shard(tmp_path / "empty" / "a.parquet", [rollout(0, length=0), rollout(1, length=0)])
    score([str(tmp_path / "empty")], str(tmp_path / "none"), ScoreOptions(model=checkpoint))
    tiny = make_checkpoint(tmp_path / "of-eight", 8)
    ids = {"prompt_ids": [1], "response_ids": [3, 4], "rollout_logprobs": [-1.0, -2.0]}
    write_shard(tmp_path / "small" / "a.parquet", [rollout(0, length=2, **ids)])
    score([str(tmp_path / "small")], str(tmp_path / "eight"), ScoreOptions(model=tiny))
    for name in ("off", "none", "eight"):
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert "evidence_worth" not in run


def test_a_stream_is_measured_on_its_first_batch_and_all_of_it_is_scored(checkpoint: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "rollouts", 2, 5)
    tables = [pq.read_table(file) for file in sorted((tmp_path / "rollouts").iterdir())]
    source, output = io.BytesIO(), io.BytesIO()
    with pa.ipc.new_stream(source, tables[0].schema.with_metadata({"trm_audit.kind": "rollouts"})) as writer:
        for table in tables:
            writer.write_table(table)
        empty = pa.RecordBatch.from_pylist([], schema=tables[0].schema)
        writer.write_batch(empty, custom_metadata={"trm_audit.last": "true", "trm_audit.total_rows": "10"})
    source.seek(0)
    assert score(["-"], output, ScoreOptions(model=checkpoint), source=source).rows == 10
    metadata = pa.ipc.open_stream(output.getvalue()).schema.metadata
    assert json.loads(metadata[b"trm_audit.run"])["evidence_worth"]["num_rollouts"] == 5


def test_what_cannot_be_measured_does_not_stop_a_run_and_a_fault_is_the_runs_to_report(
    checkpoint: Path, tmp_path: Path
) -> None:
    # GIVEN stored logits that exclude a drawn token, among the first rows
    rows = [rollout(i, "exact", length=4) for i in range(9)]
    rows[2]["rollout_logprobs"] = None
    rows[2]["logits"][1, rows[2]["response_ids"][1]] = -np.inf
    write_shard(tmp_path / "rollouts" / "a.parquet", rows)
    with pytest.raises(BadInput, match="has probability 0 in the stored logits"):
        score([str(tmp_path / "rollouts")], str(tmp_path / "out"), ScoreOptions(model=checkpoint))
    skipping = ScoreOptions(model=checkpoint, skip_bad=True)
    assert score([str(tmp_path / "rollouts")], str(tmp_path / "out"), skipping).rows == 8


# The report


def summarized(runs: list[dict[str, Any]], **thresholds: Any) -> Any:
    builder = SummaryBuilder(Thresholds(**thresholds))
    builder.add(score_batch(random_rows(np.random.default_rng(0), 12)))
    return builder.finish(runs=runs)


def test_a_report_gives_shares_at_the_deltas_nearest_to_the_criterions() -> None:
    run = run_with_floor() | {"evidence_worth": worth_of(num_rollouts=8, num_tokens=200)}
    found = evidence_worth([run, run], 0.06, "kl")  # the same run twice, as two shards say it
    assert found is not None
    assert (found.num_rollouts, found.num_tokens, found.delta_kl, found.delta_tv) == (8, 200, 0.05, 0.2)
    given = run["evidence_worth"]
    at = DELTAS.index(0.05), DELTAS.index(0.2)
    for name, kind in found.kinds.items():
        for shown, divergence, i in ((kind.kl, "kl", at[0]), (kind.tv, "tv", at[1])):
            counts = given["kinds"][name][divergence]
            assert shown.positions == counts["positions"][i] / 200
            assert shown.sequences == counts["sequences"][i] / 8
            assert shown.sequences_by_delta == [count / 8 for count in counts["sequences"]]
            assert shown.positions_by_delta == [count / 200 for count in counts["positions"]]
    sizes = [kind.bytes_per_token for kind in found.kinds.values()]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("delta_max", "max_of", "kl", "tv"),
    [
        (None, None, 0.05, 0.2),
        (0.0013, "k2", 0.001, 0.02),
        (0.1, "tv", 0.02, 0.1),
        (0.3, "tv_upper", 0.2, 0.2),
        (0.9, "abs_log_ratio", 0.05, 0.2),
        (0.0, "kl", 0.05, 0.2),
        (50.0, "kl", 1.0, 1.0),
    ],
)
def test_kl_and_tv_are_shown_at_thresholds_that_belong_together(
    delta_max: float | None, max_of: str | None, kl: float, tv: float
) -> None:
    found = evidence_worth([{"evidence_worth": worth_of()}], delta_max, max_of)
    assert found is not None
    assert (found.delta_kl, found.delta_tv) == (kl, tv)


def test_figures_of_several_runs_add_up_and_runs_without_them_do_not_count() -> None:
    first, second = worth_of(num_rollouts=8, num_tokens=200), worth_of(num_rollouts=4, num_tokens=100, confidence=0.9)
    second["kinds"]["topk:64"]["kl"]["sequences"] = [4] * len(DELTAS)
    other_grid = worth_of() | {"deltas": [0.5]}
    runs = [{}, {"evidence_worth": first}, {"evidence_worth": second}, {"evidence_worth": other_grid}]
    found = evidence_worth(runs, 0.05)
    assert found is not None
    assert (found.num_rollouts, found.num_tokens, found.confidence) == (12, 300, 0.9)
    of_first = first["kinds"]["topk:64"]["kl"]["sequences"][DELTAS.index(0.05)]
    assert found.kinds["topk:64"].kl.sequences == (of_first + 4) / 12
    assert evidence_worth([{}, {"evidence_worth": None}], 0.05) is None


def test_the_sentence_says_what_a_list_a_sketch_and_full_logits_decide_and_whose_distribution_it_was() -> None:
    worth = worth_of(num_rollouts=8, num_tokens=200, num_cut=3, num_exact=0)
    worth["kinds"]["topk:64"]["kl"]["sequences"][5] = 1
    worth["kinds"]["sketch:20,64"]["kl"]["sequences"][5] = 5
    worth["kinds"]["topk:64"]["tv"]["sequences"][7] = 2
    worth["kinds"]["sketch:20,64"]["tv"]["sequences"][7] = 8
    found = evidence_worth([{"evidence_worth": worth}], 0.05)
    assert found is not None
    assert found.sentence == (
        "Sequences whose verdict is certain at KL 0.05: 1 of 8 with the top 64 (384 bytes a token), 5 of 8 with a "
        "sketch of 64 numbers beside the top 20 (260 bytes a token), all with full logits (98,304 bytes). At TV 0.2: "
        "2 of 8 with the top 64, 8 of 8 with a sketch of 64 numbers beside the top 20."
    )
    assert "8 rollouts of 200 tokens; the first tokens of 3 longer ones, with the trainer's" in found.basis
    own = evidence_worth([{"evidence_worth": worth | {"num_exact": 8}}], 0.05)
    some = evidence_worth([{"evidence_worth": worth | {"num_exact": 2}}], 0.05)
    assert own is not None
    assert some is not None
    assert own.basis.endswith("with the sampler's own distribution.")
    assert "with the sampler's own distribution in 2, elsewhere the trainer's" in some.basis


def broken() -> Iterator[dict[str, Any]]:
    for change in (
        lambda worth: worth.pop("kinds"),
        lambda worth: worth["kinds"]["topk:64"].pop("tv"),
        lambda worth: worth["kinds"]["topk:64"]["kl"].update(positions=[1]),
        lambda worth: worth.update(num_rollouts=0),
        lambda worth: worth.update(deltas=[]),
    ):
        worth = copy.deepcopy(worth_of())
        change(worth)
        yield worth


@pytest.mark.parametrize("worth", [*broken(), [], "much"], ids=str)
def test_figures_that_are_none_are_refused(worth: object) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        evidence_worth([{"evidence_worth": worth}], 0.05)


def test_every_form_of_the_report_shows_it_or_is_silent(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    # GIVEN a score folder that carries the figures, and one that does not
    write_shards(tmp_path / "rollouts", 1, 8, "exact")
    for name, more in (("with", {}), ("without", {"noise_floor": 0.0})):
        score([str(tmp_path / "rollouts")], str(tmp_path / name), ScoreOptions(model=checkpoint, **more))  # type: ignore[arg-type]
    for form, more in (("terminal", ["--full"]), ("md", []), ("html", [])):
        command = ["report", tmp_path / "with", "--delta-max", "0.05", "--format", form, *more]
        said = " ".join(run(*command).out.decode().split())
        assert "with the sampler's own distribution." in said.replace("&#39;", "'"), form
        assert ("topk:20" in said) == (form != "md")
        command[1] = tmp_path / "without"
        assert "own distribution" not in run(*command).out.decode()
    found = json.loads(run("report", tmp_path / "with", "--json").out)["evidence_worth"]
    assert found["num_rollouts"] == 8
    assert json.loads(run("report", tmp_path / "without", "--json").out)["evidence_worth"] is None
    gate = "evidence_worth.kinds.sketch:20,64.kl.positions>=0"
    assert run("report", tmp_path / "with", "--fail-on", gate).code == 1


def test_a_summary_carries_it_with_its_own_criterion() -> None:
    run = {"evidence_worth": worth_of()}
    assert summarized([run], delta_max=0.01, max_of="kl").evidence_worth == evidence_worth([run], 0.01, "kl")
    assert summarized([]).evidence_worth is None
