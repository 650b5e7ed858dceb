"""Each warning is given where it applies and nowhere else; the counts behind it are those of a plain loop over rows."""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_rows import Row, random_rows, run_with_floor, score_batch
from scipy.stats import pointbiserialr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trm_audit.numerics.histogram import Moments
from trm_audit.report.blocks import Finding, Metric
from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.columns import ScoreBatch
from trm_audit.report.decode import TokenText, token_text
from trm_audit.report.findings import CODES, evidence, findings
from trm_audit.report.noise import noise_floor
from trm_audit.report.quality import SAMPLE_SIZE, QualityTotals
from trm_audit.report.summary import Counts, Share, Violations

SAMPLES = Path(__file__).parents[1] / "sample_data"
COUNTS = Counts(
    n_total=400,
    grades={"sampled": 400},
    audited_policies={"sampling": 400},
    num_tokens=5000,
    num_groups=100,
    num_without_policy_tokens=0,
    num_disagreements=0,
    num_infinite=0,
    num_skipped=0,
    num_dropped=0,
    horizon=30,
)


def batch_of(rows: list[Row]) -> pa.RecordBatch:
    """Rows as they are, null where one lacks a column that another has."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.RecordBatch.from_pydict({name: [row.get(name) for row in rows] for name in names})


def totals(*batches: pa.RecordBatch, keep: list[bool] | None = None) -> QualityTotals:
    quality = QualityTotals()
    at = 0
    for batch in batches:
        mine = None if keep is None else np.array(keep[at : at + batch.num_rows], dtype=bool)
        quality.add(ScoreBatch(batch), mine)
        at += batch.num_rows
    return quality


def found(quality: QualityTotals | None = None, **given: Any) -> dict[str, Finding]:
    """Findings by code; what is not given is as in data without fault."""
    options: dict[str, Any] = {
        "counts": COUNTS,
        "metrics": {},
        "acceptance": None,
        "noise_floor": None,
        "violations": None,
        "tokenizer": None,
    }
    said = findings(quality or QualityTotals(), **(options | given))
    assert [f.code for f in said] == sorted((f.code for f in said), key=CODES.index)
    return {f.code: f for f in said}


def sound(seed: int = 0, rows: int = 12, length: int = 20) -> list[Row]:
    """Rows whose policies differ a little, without fault."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(rows):
        rollout = -rng.exponential(0.7, length)
        trainer = np.minimum(rollout + rng.normal(0, 0.05, length), 0)
        out.append(
            {
                "rollout_id": f"r{seed}-{i}",
                "logprobs_mode": "raw",
                "response_ids": [*rng.integers(1, 50, length - 1).tolist(), 0],
                "response_mask": [True] * length,
                "rollout_logprobs": rollout.tolist(),
                "trainer_logprobs": trainer.tolist(),
                "num_tokens": length,
                "num_disagreements": 0,
            }
        )
    return out


# The counts, against a plain loop


def any_rows(seed: int, count: int = 80) -> list[Row]:
    """Rows of all lengths with holes, nulls, zeros, placeholders, infinities, shifts and changes of version."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for i in range(count):
        length = int(rng.integers(0, 30))
        rollout = -rng.exponential(0.7, length)
        trainer = rollout + rng.normal(0, 0.05, length)
        kind = rng.integers(0, 9)
        start = int(rng.integers(0, length + 1))
        if kind == 0:
            rollout[start:] = 0
        elif kind == 1:
            rollout[start : start + 9] = 0
        elif kind == 2:
            rollout[rng.random(length) < 0.4] = 0
        elif kind == 3:
            rollout[rng.random(length) < 0.1] = rng.choice([-9999.0, -1000.0, 0.002, -math.inf])
        elif kind == 4:
            rollout = np.roll(rollout, 1)
        elif kind == 5:
            rollout = np.roll(rollout, -1)
        elif kind == 6:
            rollout[:] = 0
            trainer[rng.random(length) < 0.9] = -1e-6
        trainer[rng.random(length) < 0.02] = -math.inf
        versions = [None if rng.random() < 0.1 else int(v) for v in rng.integers(3, 3 + rng.integers(1, 3), length)]
        rows.append(
            {
                "rollout_id": f"r{seed}-{i}",
                "grade": str(rng.choice(["exact", "sampled"])),
                "logprobs_mode": str(rng.choice(["raw", "processed", "tempered"], p=[0.7, 0.2, 0.1])),
                "top_p": float(rng.choice([1.0, 0.9])),
                "top_k": int(rng.choice([-1, 0, 20])),
                "response_ids": rng.integers(0, 50, length).tolist(),
                "response_mask": [bool(b) for b in rng.random(length) < 0.95],
                "rollout_logprobs": None if rng.random() < 0.05 else rollout.tolist(),
                "trainer_logprobs": None if rng.random() < 0.05 else trainer.tolist(),
                "policy_version": None if rng.random() < 0.3 else versions,
                "num_tokens": length,
                "num_disagreements": None if rng.random() < 0.1 else int(rng.integers(0, 3)),
            }
        )
    return rows


def by_hand(rows: list[Row]) -> Counter[str]:
    """The counts of `QualityTotals`, row by row."""
    out: Counter[str] = Counter()
    for row in rows:
        inside = [t for t, m in enumerate(row["response_mask"]) if m]
        out["num_rows"] += 1
        out["num_checked"] += row["num_disagreements"] is not None
        out["num_disagreeing"] += bool(row["num_disagreements"])
        out["disagreeing_tokens"] += row["num_disagreements"] or 0
        truncated = row["top_p"] < 1 or row["top_k"] > 0
        out["num_truncated"] += truncated
        out["num_cut"] += truncated and row["grade"] == "exact"
        versions = {row["policy_version"][t] for t in inside} if row["policy_version"] else set()
        out["num_several_versions"] += len(versions - {None}) > 1
        if row["rollout_logprobs"] is None:
            continue
        rollout = [row["rollout_logprobs"][t] for t in inside]
        trainer = [row["trainer_logprobs"][t] for t in inside] if row["trainer_logprobs"] else [math.nan] * len(inside)
        normal = row["logprobs_mode"] == "processed" or (row["grade"] == "exact" and truncated)
        out += zeros_by_hand(rollout, trainer, normal)
        out += shifts_by_hand(inside, rollout, trainer)
    return out


def zeros_by_hand(rollout: list[float], trainer: list[float], normal: bool) -> Counter[str]:
    wrong, at, loose, tail = 0, 0, [], False
    for value, group in itertools.groupby(rollout, key=lambda v: v == 0 and not normal):
        size = len(list(group))
        unsure = sum(q < -0.01 for q in trainer[at : at + size])
        long = size >= 8 and unsure >= max(2, 0.1 * size)
        if value and long and at + size == len(rollout) and size < len(rollout):
            tail = True
        elif value:
            loose.append((size, unsure, long))
        at += size
    zeros, unsure = sum(size for size, _, _ in loose), sum(unsure for _, unsure, _ in loose)
    many = zeros > 0.3 * len(rollout) and unsure >= max(2, 0.1 * zeros)
    wrong = zeros if many else sum(size for size, _, long in loose if long)
    wrong += sum(p <= -1000 or p > 1e-3 for p in rollout)
    return Counter(
        num_logprobs=int(bool(rollout)),
        num_placeholders=int(wrong > 0),
        placeholder_tokens=wrong,
        num_zero_tails=int(tail),
    )


def shifts_by_hand(inside: list[int], rollout: list[float], trainer: list[float]) -> Counter[str]:
    near = [abs(p) < 1000 and abs(q) < 1000 for p, q in zip(rollout, trainer, strict=True)]
    pairs = [i for i in range(len(inside) - 1) if inside[i + 1] == inside[i] + 1 and near[i] and near[i + 1]]

    def distance(of_trainer: int, of_rollout: int) -> float:
        return math.fsum(abs(trainer[i + of_trainer] - rollout[i + of_rollout]) for i in pairs)

    if len(pairs) < 3:
        return Counter()
    later, earlier = distance(0, 1) < distance(0, 0) / 2, distance(1, 0) < distance(1, 1) / 2
    return Counter(num_shift_tried=1, num_later=int(later), num_earlier=int(earlier))


@pytest.mark.parametrize("seed", range(6))
def test_counts_are_those_of_a_loop_over_the_rows(seed: int) -> None:
    rows = any_rows(seed)
    assert +totals(batch_of(rows)).counts == +by_hand(rows)


def test_the_rows_of_these_tests_have_every_fault() -> None:
    counts = sum((by_hand(any_rows(seed)) for seed in range(6)), Counter())
    assert len(counts) == 14
    assert min(counts.values()) >= 5


def test_batches_of_any_size_and_halves_added_give_the_same() -> None:
    rows = any_rows(0) + any_rows(1)
    keep = [bool(row["num_tokens"] % 3) for row in rows]
    whole = totals(batch_of(rows), keep=keep)
    table = batch_of(rows)
    for size in (1, 7, 100):
        parts = [table.slice(at, size) for at in range(0, len(rows), size)]
        assert_same(totals(*parts, keep=keep), whole)
    for at in (0, 1, 90, len(rows)):
        halves = (
            totals(table.slice(0, at), keep=keep[:at]),
            totals(table.slice(at), keep=keep[at:]),
        )
        assert_same(halves[0] + halves[1], whole)
        assert_same(halves[1] + halves[0], whole)


def assert_same(a: QualityTotals, b: QualityTotals) -> None:
    assert +a.counts == +b.counts
    assert a.sample.responses == b.sample.responses
    for x, y in ((a.kept, b.kept), (a.rejected, b.rejected)):
        assert dataclasses.astuple(x) == pytest.approx(dataclasses.astuple(y), rel=1e-12)


def test_nothing_read_is_nothing_found() -> None:
    empty = batch_of(any_rows(0)).slice(0, 0)
    assert +totals(empty).counts == Counter()
    assert found(totals(empty), counts=dataclasses.replace(COUNTS, n_total=0, grades={}, num_tokens=0)) == {}


@pytest.mark.parametrize("name", [*any_rows(0)[0], "response_mask and lists"])
def test_any_column_may_be_absent_or_null(name: str) -> None:
    rows = any_rows(1)
    gone = {"response_mask", "rollout_logprobs", "trainer_logprobs"} if " and " in name else {name}
    without = totals(batch_of([{k: v for k, v in row.items() if k not in gone} for row in rows]))
    nulls = totals(batch_of([row | dict.fromkeys(gone) for row in rows]))
    assert +without.counts == +nulls.counts
    assert without.counts["num_rows"] == len(rows)
    assert without.sample.responses == nulls.sample.responses
    assert bool(without.sample.responses) == (name not in ("rollout_id", "response_ids"))


def test_rows_without_lists_are_as_if_they_were_not_there() -> None:
    rows = any_rows(2)
    blank = {"rollout_id": "b", "response_ids": None, "response_mask": None, "rollout_logprobs": None}
    mixed = totals(batch_of([row for pair in zip(rows, [blank] * len(rows), strict=True) for row in pair]))
    assert +(mixed.counts - Counter(num_rows=len(rows))) == +by_hand(rows)


# Log-probabilities that cannot be


def test_sound_data_have_no_finding() -> None:
    quality = totals(batch_of(sound(rows=100)), keep=[bool(i % 7) for i in range(100)])
    ratio = Metric(1.02, 0.99, 1.05, 5000, 100, "", {})
    floor = noise_floor([run_with_floor()], [("seq_max_kl", 0.05)])
    share = Share(400, 40, 0.1, 0.13)
    said = found(
        quality,
        metrics={"mean_ratio": ratio},
        acceptance=0.9,
        noise_floor=floor,
        violations=Violations("seq_max_kl", 0.05, share, None),
        tokenizer=bpe(),
    )
    assert said == {}


@pytest.mark.parametrize("value", [-9999.0, -1000.0, -math.inf, 0.5])
def test_one_value_that_is_no_log_probability_is_a_placeholder(value: float) -> None:
    rows = sound()
    rows[3]["rollout_logprobs"][5] = value
    finding = found(totals(batch_of(rows)))["placeholder_logprobs"]
    assert (finding.n, finding.of, finding.unit) == (1, 12, "sequences")
    assert "1 of 12 sequences (1 tokens)" in finding.sentence


def test_a_run_of_zeros_that_the_trainer_contradicts_is_placeholders() -> None:
    rows = sound(length=40)
    rows[3]["rollout_logprobs"][5:13] = [0.0] * 8
    finding = found(totals(batch_of(rows)))["placeholder_logprobs"]
    assert (finding.n, finding.of) == (1, 12)
    assert "(8 tokens)" in finding.sentence
    rows[3]["rollout_logprobs"][12] = -0.1
    assert found(totals(batch_of(rows))) == {}


def test_zeros_on_many_tokens_are_placeholders_however_they_lie() -> None:
    rows = sound(length=40)
    for row in rows[:2]:
        row["rollout_logprobs"][::3] = [0.0] * 14
    assert "(28 tokens)" in found(totals(batch_of(rows)))["placeholder_logprobs"].sentence
    for row in rows[:2]:
        row["rollout_logprobs"][30::3] = [-0.1] * 4
    assert found(totals(batch_of(rows))) == {}


def test_zeros_of_a_policy_that_is_sure_are_no_placeholders() -> None:
    rows = sound()
    for row in rows:
        row["rollout_logprobs"][4:] = [0.0] * 16
        row["trainer_logprobs"][4:] = [-1e-4] * 15 + [-0.5]
    assert found(totals(batch_of(rows))) == {}


def test_zeros_of_a_truncated_sampler_are_no_placeholders() -> None:
    rows = sound()
    for row in rows:
        row["rollout_logprobs"][2:18] = [0.0] * 16
    assert set(found(totals(batch_of(rows)))) == {"placeholder_logprobs"}
    for more in ({"logprobs_mode": "processed"}, {"grade": "exact", "top_p": 0.9}, {"grade": "exact", "top_k": 20}):
        assert set(found(totals(batch_of([row | more for row in rows])))) <= {"truncated_sampler"}
    for more in ({"grade": "sampled", "top_p": 0.9}, {"grade": "exact", "top_p": 1.0, "top_k": -1}):
        assert set(found(totals(batch_of([row | more for row in rows])))) == {"placeholder_logprobs"}


def test_zeros_outside_the_mask_are_nobodys_business() -> None:
    rows = sound()
    for row in rows:
        row["rollout_logprobs"][6:] = [0.0] * 14
        row["response_mask"] = [True] * 6 + [False] * 14
    assert found(totals(batch_of(rows))) == {}


def test_a_tail_of_zeros_is_padding_and_not_placeholders() -> None:
    rows = sound(length=40)
    for row in rows[:5]:
        row["rollout_logprobs"][32:] = [0.0] * 8
    said = found(totals(batch_of(rows)))
    assert set(said) == {"zero_tails"}
    assert (said["zero_tails"].n, said["zero_tails"].of) == (5, 12)
    for row in rows[:5]:
        row["rollout_logprobs"][32] = -0.1
    assert found(totals(batch_of(rows))) == {}


def test_a_row_of_zeros_only_has_placeholders_and_no_tail() -> None:
    rows = sound()
    rows[0]["rollout_logprobs"] = [0.0] * 20
    assert set(found(totals(batch_of(rows)))) == {"placeholder_logprobs"}


# Lists that are off by one


@pytest.mark.parametrize("by", [1, -1])
def test_shifted_log_probabilities_are_found_with_their_side(by: int) -> None:
    rows = sound()
    for row in rows:
        row["rollout_logprobs"] = np.roll(row["rollout_logprobs"], by).tolist()
    finding = found(totals(batch_of(rows)))["shifted_logprobs"]
    assert (finding.n, finding.of, finding.unit) == (12, 12, "sequences")
    assert f"one token {'later' if by == 1 else 'earlier'}" in finding.sentence


def test_half_of_the_sequences_shifted_is_not_said() -> None:
    rows = sound()
    for row in rows[:6]:
        row["rollout_logprobs"] = np.roll(row["rollout_logprobs"], 1).tolist()
    assert "shifted_logprobs" not in found(totals(batch_of(rows)))


def test_a_shift_is_not_looked_for_across_a_hole_in_the_mask() -> None:
    # GIVEN shifted rows of which no two neighbours were sampled
    rows = sound()
    for row in rows:
        row["rollout_logprobs"] = np.roll(row["rollout_logprobs"], 1).tolist()
        row["response_mask"] = [bool(t % 2) for t in range(20)]
    quality = totals(batch_of(rows))
    assert quality.counts["num_shift_tried"] == 0
    assert found(quality) == {}


@pytest.fixture(scope="module")
def real() -> pa.RecordBatch:
    """Rollouts of llama.cpp beside the trainer's log-probabilities of an independent score."""
    folder = SAMPLES / "smollm2" / "top20"
    rollouts, reference = (pq.read_table(folder / f"{name}.parquet") for name in ("rollouts", "reference"))
    assert rollouts["rollout_id"].equals(reference["rollout_id"])
    table = rollouts.append_column("trainer_logprobs", reference["trainer_logprobs"])
    return table.combine_chunks().to_batches()[0]


def test_real_rollouts_have_none_of_these_faults(real: pa.RecordBatch) -> None:
    quality = totals(real)
    assert found(quality) == {}
    assert quality.counts["num_shift_tried"] == real.num_rows == 16
    assert quality.counts["num_later"] == quality.counts["num_earlier"] == 0


@pytest.mark.parametrize("side", ["later", "earlier"])
def test_real_rollouts_shifted_by_one_are_found_out(real: pa.RecordBatch, side: str) -> None:
    lists = real.column("rollout_logprobs").to_pylist()
    moved = [[0.0, *values[:-1]] if side == "later" else [*values[1:], 0.0] for values in lists]
    columns = {name: real.column(name) for name in real.schema.names} | {"rollout_logprobs": pa.array(moved)}
    finding = found(totals(pa.RecordBatch.from_pydict(columns)))["shifted_logprobs"]
    assert f"one token {side}" in finding.sentence
    assert (finding.n, finding.of) == (16, 16)


# What other columns say


def test_disagreements_are_said_with_their_tokens() -> None:
    rows = sound()
    rows[0]["num_disagreements"], rows[7]["num_disagreements"] = 3, 4
    finding = found(totals(batch_of(rows)))["disagreements"]
    assert (finding.n, finding.of) == (2, 12)
    assert "7 tokens in 2 of 12 sequences" in finding.sentence


def test_several_versions_count_over_policy_tokens_only() -> None:
    rows = sound()
    for row in rows:
        row["policy_version"] = [5] * 20
    rows[0]["policy_version"] = [5] * 10 + [6] * 10
    rows[1]["policy_version"] = [5] * 10 + [6] + [5] * 9
    rows[1]["response_mask"] = [t != 10 for t in range(20)]
    finding = found(totals(batch_of(rows)))["several_policy_versions"]
    assert (finding.n, finding.of, finding.unit) == (1, 12, "sequences")
    assert found(totals(batch_of([row | {"policy_version": 5 + i} for i, row in enumerate(rows)]))) == {}


def test_length_correlation_is_scipys() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 500, 200)
    keep = rng.random(200) < 0.9 - lengths / 800
    quality = totals(batch_of([{"num_tokens": int(n)} for n in lengths]), keep=keep.tolist())
    assert quality.length_correlation() == pytest.approx(pointbiserialr(~keep, lengths)[0], rel=1e-12)


@pytest.mark.parametrize("side", ["long", "short"])
def test_rejection_by_length_is_said_with_the_mean_lengths(side: str) -> None:
    keep = [bool(i % 3) for i in range(300)]
    rows = [{"num_tokens": (100 if kept == (side == "long") else 250) + i % 7} for i, kept in enumerate(keep)]
    finding = found(totals(batch_of(rows), keep=keep))["length_correlated_rejection"]
    assert (finding.n, finding.of) == (100, 300)
    assert ("2.5 times as long" if side == "long" else "0.41 times as long") in finding.sentence
    assert f"so that {side} responses are trained on less" in finding.sentence


def test_rejection_by_length_needs_more_than_chance_and_more_than_a_trace() -> None:
    # GIVEN a strong correlation of few rows, and a certain one that is small
    few = [{"num_tokens": n} for n in (10, 11, 12, 13, 300, 310)]
    assert found(totals(batch_of(few), keep=[True] * 4 + [False] * 2)) == {}
    rng = np.random.default_rng(0)
    lengths = rng.normal(500, 100, 20_000)
    many = batch_of([{"num_tokens": int(n)} for n in lengths])
    keep = rng.normal(0, 1, 20_000) > 0.001 * (lengths - 500)
    quality = totals(many, keep=keep.tolist())
    assert 0.05 < quality.length_correlation() < 0.2
    assert found(quality) == {}


def test_rows_without_policy_tokens_do_not_make_a_correlation() -> None:
    rows = [{"num_tokens": 0 if i % 2 else 100 + i % 7} for i in range(200)]
    quality = totals(batch_of(rows), keep=[not i % 2 for i in range(200)])
    assert (quality.kept.count, quality.rejected) == (100, Moments())
    assert math.isnan(quality.length_correlation())
    assert found(quality) == {}


# Responses that were made from text


def bpe() -> TokenText:
    """A byte-level tokenizer with a few merges and one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the other then there these the other"] * 20, trainer)
    return TokenText(tokenizer)


def of_text(tokenizer: TokenText, rows: int = 16) -> list[Row]:
    texts = ["the other then " * 3 + "these " * (i % 5) + "there" for i in range(rows)]
    ids = [tokenizer._tokenizer.encode(text).ids for text in texts]
    assert min(map(len, ids)) >= 8
    return [{"rollout_id": f"t{i}", "response_ids": each} for i, each in enumerate(ids)]


def test_responses_that_all_survive_their_text_were_made_from_it() -> None:
    tokenizer = bpe()
    finding = found(totals(batch_of(of_text(tokenizer))), tokenizer=tokenizer)["retokenized"]
    assert (finding.n, finding.of, finding.unit) == (16, 16, "sequences")


def split_first(tokenizer: TokenText, row: Row) -> Row:
    """The same text with its first token spelled in letters, as a model samples it now and then."""
    letters = [tokenizer._tokenizer.token_to_id(letter) for letter in tokenizer.text(row["response_ids"][0])]
    assert len(letters) > 1
    return row | {"response_ids": letters + row["response_ids"][1:]}


def test_one_response_that_was_sampled_clears_them_all() -> None:
    tokenizer = bpe()
    rows = of_text(tokenizer)
    eos = tokenizer._tokenizer.token_to_id("<eos>")
    ended = rows[3] | {"response_ids": [*rows[3]["response_ids"], eos]}
    impossible = rows[3] | {"response_ids": [*rows[3]["response_ids"], -1]}
    for other in (split_first(tokenizer, rows[3]), ended, impossible):
        assert found(totals(batch_of([*rows[:3], other, *rows[4:]])), tokenizer=tokenizer) == {}


def test_few_short_or_cut_responses_say_nothing_of_text() -> None:
    tokenizer = bpe()
    rows = of_text(tokenizer)
    short = [row | {"response_ids": row["response_ids"][:7]} for row in rows]
    cut = [row | {"finish_reason": "length"} for row in rows]
    for quality in (totals(batch_of(rows[1:])), totals(batch_of(short)), totals(batch_of([rows[0], *cut[1:]]))):
        assert found(quality, tokenizer=tokenizer) == {}
    assert found(totals(batch_of(rows)), tokenizer=None) == {}


def test_ids_that_a_model_really_sampled_are_not_taken_for_text() -> None:
    rollouts = pq.read_table(SAMPLES / "tiny" / "rollouts" / "rollouts-00000.parquet")
    quality = totals(*rollouts.combine_chunks().to_batches())
    assert len(quality.sample.responses) > 90
    assert found(quality, tokenizer=token_text(SAMPLES / "tiny" / "model")) == {}


def test_a_tokenizer_of_single_characters_says_nothing_of_text() -> None:
    tokenizer = token_text(SAMPLES / "tiny" / "model")
    assert tokenizer is not None
    ids = tokenizer._tokenizer.encode("3+8+5=3 11 16;16", add_special_tokens=False).ids
    rows = [{"rollout_id": f"t{i}", "response_ids": ids} for i in range(16)]
    assert tokenizer.retokenize(ids) == ids
    assert found(totals(batch_of(rows)), tokenizer=tokenizer) == {}


def test_the_sample_is_the_responses_with_the_smallest_hashes() -> None:
    rows = [{"rollout_id": f"é{i}", "response_ids": [i] * 8} for i in range(2000)]
    smallest = sorted((zlib.crc32(row["rollout_id"].encode()), row["rollout_id"], row["response_ids"]) for row in rows)
    table = batch_of(rows)
    assert totals(table).sample.responses == smallest[:SAMPLE_SIZE]
    parts = [table.slice(at, 300) for at in range(0, 2000, 300)]
    assert totals(*reversed(parts)).sample.responses == smallest[:SAMPLE_SIZE]


# What the counts, the verdicts and the noise floor say


@pytest.mark.parametrize(
    ("code", "changed", "n", "of", "unit"),
    [
        ("infinite_divergence", {"num_infinite": 3}, 3, 5000, "tokens"),
        ("raw_policy", {"audited_policies": {"raw": 50, "sampling": 350}}, 50, 400, "sequences"),
        ("tempered_policy", {"audited_policies": {"tempered": 7, "sampling": 393}}, 7, 400, "sequences"),
        ("skipped_rows", {"num_skipped": 20}, 20, 420, "sequences"),
        ("dropped_rows", {"num_dropped": 100}, 100, 400, "sequences"),
        ("no_policy_tokens", {"num_without_policy_tokens": 5}, 5, 400, "sequences"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_counts_are_said_in_words(code: str, changed: dict[str, Any], n: int, of: int, unit: str) -> None:
    said = found(counts=dataclasses.replace(COUNTS, **changed))
    assert set(said) == {code}
    assert (said[code].n, said[code].of, said[code].unit) == (n, of, unit)
    assert f"{n} of {of} {unit}" in said[code].sentence


def test_a_mean_ratio_away_from_1_is_said_where_chance_does_not_explain_it() -> None:
    def said(value: float, low: float, high: float) -> set[str]:
        return set(found(metrics={"mean_ratio": Metric(value, low, high, 5000, 100, "", {})}))

    assert said(0.93, 0.92, 0.94) == said(1.2, 1.1, 1.3) == {"mean_ratio"}
    for quiet in ((0.93, 0.8, 1.01), (0.995, 0.994, 0.996), (math.inf, math.nan, math.nan), (0.9, math.nan, math.nan)):
        assert said(*quiet) == set()


@pytest.mark.parametrize("grade", ["exact", "sketch", "sampled"])
def test_the_kl_of_a_truncated_sampler_is_said_to_hold_what_was_cut_off(grade: str) -> None:
    rows = [row | {"top_p": 0.9, "grade": grade} for row in sound()]
    counts = dataclasses.replace(COUNTS, grades={grade: len(rows)})
    metrics = {"mean_ratio": Metric(0.9, 0.8, 1.1, 5000, 100, "", {})}
    said = found(totals(batch_of(rows)), counts=counts, metrics=metrics)
    assert ("truncated_sampler" in said) == (grade != "sampled")
    if grade != "sampled":
        sentence = said["truncated_sampler"].sentence
        assert f"{len(rows)} of {len(rows)} sequences" in sentence
        assert "0.11 a token" in sentence
        assert ("up to twice" in sentence) == (grade == "sketch")


def test_the_mean_ratio_names_its_cause_by_how_was_sampled() -> None:
    metrics = {"mean_ratio": Metric(0.93, 0.92, 0.94, 5000, 100, "", {})}
    truncated = totals(batch_of([row | {"top_p": 0.9} for row in sound()]))
    raw = dataclasses.replace(COUNTS, audited_policies={"raw": 400})
    sentences = [
        found(truncated, metrics=metrics)["mean_ratio"].sentence,
        found(truncated, metrics=metrics, counts=raw)["mean_ratio"].sentence,
        found(metrics=metrics)["mean_ratio"].sentence,
    ]
    assert "0.93 (95 % interval 0.92 to 0.94)" in sentences[0]
    assert "k3 understates KL by about 0.07" in sentences[0]
    assert "k3 does not estimate a KL" in sentences[1]
    assert "No truncation that is recorded" in sentences[2]
    above = found(truncated, metrics={"mean_ratio": Metric(1.2, 1.1, 1.3, 5000, 100, "", {})})["mean_ratio"].sentence
    assert "No truncation that is recorded" in above


def test_low_acceptance_is_that_of_the_verdicts_or_of_delta_max() -> None:
    finding = found(acceptance=0.54)["low_acceptance"]
    assert (finding.n, finding.of) == (184, 400)
    assert "Only 54 % of 400 sequences are kept" in finding.sentence
    below = Violations("seq_max_kl", 0.05, Share(390, 195, 0.5, 0.54), None)
    finding = found(violations=below)["low_acceptance"]
    assert (finding.n, finding.of) == (195, 390)
    assert "Only 50 % of 390 sequences stay within delta_max 0.05 (seq_max_kl)" in finding.sentence
    assert found(acceptance=0.7) == found(acceptance=0.8, violations=below) == {}


def test_each_threshold_below_the_noise_floor_is_said_and_a_floor_that_was_not_measured() -> None:
    limits = [("seq_max_kl", 0.001), ("seq_mean_kl", 1e-6), ("seq_max_kl", 1.0)]
    floor = noise_floor([run_with_floor()], limits)
    said = findings(
        QualityTotals(), counts=COUNTS, metrics={}, acceptance=None, noise_floor=floor, violations=None, tokenizer=None
    )
    assert floor is not None
    assert [f.code for f in said] == ["below_noise_floor"] * 2
    assert [f.sentence for f in said] == [below.sentence for below in floor.below]
    unmeasured = run_with_floor(dtype="float16") | {"noise_floor": None}
    (finding,) = found(noise_floor=noise_floor([unmeasured])).values()
    assert finding.code == "unmeasured_noise_floor"
    assert "float16 (head bfloat16), and the noise floor of that was not measured:" in finding.sentence
    both = found(noise_floor=noise_floor([unmeasured, run_with_floor()]))
    assert "was not measured in 1 of 2 runs" in both["unmeasured_noise_floor"].sentence


def test_the_most_serious_stands_first() -> None:
    rows = sound()
    rows[3]["rollout_logprobs"][5] = -9999.0
    rows[4]["num_disagreements"] = 1
    counts = dataclasses.replace(COUNTS, num_infinite=1, num_skipped=2)
    said = list(found(totals(batch_of(rows)), counts=counts, acceptance=0.1))
    assert said == ["placeholder_logprobs", "disagreements", "infinite_divergence", "low_acceptance", "skipped_rows"]


def test_the_counts_of_a_report_can_be_put_into_words() -> None:
    # GIVEN rows as other tests of the report have them
    batch = score_batch(random_rows(np.random.default_rng(0), 60))
    builder = SummaryBuilder()
    builder.add(batch)
    counts = builder.finish().counts
    said = found(totals(batch), counts=counts)
    assert set(said) == {"disagreements", "no_policy_tokens"}
    assert said["disagreements"].sentence.startswith("Stored")
    assert f"{counts.num_disagreements} tokens" in said["disagreements"].sentence


# What the evidence permits


def test_evidence_claims_no_more_than_its_grade() -> None:
    said = {grade: evidence(dataclasses.replace(COUNTS, grades={grade: 400})) for grade in ("exact", "interval")}
    said["sampled"] = evidence(COUNTS)
    assert [grade for grade in said if "exact KL" in said[grade]] == ["exact"]
    assert [grade for grade in said if "rigorous" in said[grade]] == ["interval"]
    assert [grade for grade in said if "an estimate" in said[grade]] == ["sampled"]
    assert all("Contexts that were not sampled were not seen" in sentence for sentence in said.values())


def test_evidence_of_mixed_grades_says_how_many_have_each() -> None:
    sentence = evidence(dataclasses.replace(COUNTS, grades={"exact": 100, "sampled": 300}))
    assert "100 of 400 sequences exact (exact KL" in sentence
    assert "300 of 400 sequences sampled (an estimate" in sentence


def test_evidence_of_raw_rows_does_not_speak_of_the_sampler() -> None:
    sentence = evidence(dataclasses.replace(COUNTS, audited_policies={"raw": 400}))
    assert "for 400 sequences this speaks of another policy than the one that sampled" in sentence
    assert "another policy" not in evidence(COUNTS)


def test_without_evidence_nothing_is_claimed() -> None:
    assert "nothing can be claimed" in evidence(dataclasses.replace(COUNTS, grades={}))
