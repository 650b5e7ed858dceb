"""The scorer against a plain loop: one sequence, one position at a time, float64 after the model's float32 forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from models import VOCAB, logits_alone, save, tiny_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from trm_audit.engine.checkpoint import find_checkpoint
from trm_audit.engine.footing import Comparison, comparison
from trm_audit.engine.model import TrainerModel
from trm_audit.engine.scorer import Scorer
from trm_audit.engine.stored import score_stored
from trm_audit.errors import BadInput
from trm_audit.rollout import DIVERGENCES, TOKEN_SCORES, RolloutBatch, Sampling, TokenScores
from trm_audit.shards.logits import StoredLogits
from trm_audit.shards.rollout_writer import LogitsTableWriter
from trm_audit.shards.rows import RowRules, read_rows
from trm_audit.shards.schema import ROLLOUT_COLUMNS
from trm_audit.shards.scores import score_columns

Row = dict[str, Any]
K = 12
SETTINGS = {
    "plain": Sampling(),
    "raw": Sampling(0.7, 0.9, -1, "raw"),
    "raw-tempered-only": Sampling(1.4, 1.0, -1, "raw"),
    "raw-top-k": Sampling(1.0, 1.0, 30, "raw"),
    "tempered": Sampling(0.7, 1.0, -1, "tempered"),
    "tempered-truncated": Sampling(1.3, 0.95, 40, "tempered"),
    "processed": Sampling(0.6, 0.9, 30, "processed"),
}
AUDITED = {  # full logits are rebuilt; other raw values are compared raw and say nothing about the tempered policy
    "raw": "raw",
    "raw-tempered-only": "raw",
    "raw-top-k": "raw",
    "tempered-truncated": "tempered",
}


# --- rollouts: really sampled, from a policy near the trainer


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64) - z.max()
    return z - math.log(np.exp(z).sum())


def truncated(z: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """Top-k, then top-p: -inf from the first token on that is not needed to reach the mass."""
    z = z.copy()
    if top_k > 0:
        z[z < np.sort(z)[-top_k]] = -np.inf
    order, p = np.argsort(-z), np.exp(log_softmax(z))
    if top_p < 1:
        z[order[np.cumsum(p[order]) - p[order] >= top_p]] = -np.inf
    return z


def at_stage(raw: np.ndarray, sampling: Sampling, stage: str) -> np.ndarray:
    """Raw logits [V] at one of the three stages."""
    z = raw.astype(np.float64)
    if stage != "raw":
        z = z / sampling.temperature
    return truncated(z, sampling.top_p, sampling.top_k) if stage == "processed" else z


def sample_row(policy: PreTrainedModel, name: str, grade: str, sampling: Sampling, seed: int, length: int = 14) -> Row:
    """A rollout with the evidence of a grade; in every other one a tool answers in the middle."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, VOCAB, int(rng.integers(1, 9))).tolist()
    mask = [not (seed % 2 and length // 3 <= t < length // 2) for t in range(length)]
    response: list[int] = []
    stored = []
    for own in mask:
        raw = logits_alone(policy, torch.tensor(prompt + response))[-1].numpy()
        p = np.exp(log_softmax(at_stage(raw, sampling, "processed")))
        response.append(int(rng.choice(VOCAB, p=p / p.sum()) if own else rng.integers(VOCAB)))
        stored.append(at_stage(raw, sampling, sampling.logprobs_mode))
    logprobs = [log_softmax(z) for z in stored]
    row: Row = {
        "rollout_id": name,
        "prompt_ids": prompt,
        "response_ids": response,
        "response_mask": mask,
        "rollout_logprobs": [lp[i] if own else math.nan for lp, i, own in zip(logprobs, response, mask, strict=True)],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "logprobs_mode": sampling.logprobs_mode,
    }
    if grade == "exact":
        row["logits"] = np.stack(stored).astype(np.float32)
    if grade == "interval":
        top = [[int(i) for i in np.argsort(-lp)[: K + seed % 3] if np.isfinite(lp[i])] for lp in logprobs]
        row["rollout_topk_ids"] = top
        row["rollout_topk_logprobs"] = [[lp[i] for i in ids] for lp, ids in zip(logprobs, top, strict=True)]
    return row


def sharp_model() -> PreTrainedModel:
    """A tiny model that is surer of itself, so that nuclei and lists differ from position to position."""
    model = tiny_model("llama", seed=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def trainer() -> PreTrainedModel:
    return sharp_model()


@pytest.fixture(scope="module")
def model(trainer: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> TrainerModel:
    return TrainerModel(find_checkpoint(save(trainer, tmp_path_factory.mktemp("trainer"))), device="cpu")


@pytest.fixture(scope="module")
def policy(trainer: PreTrainedModel) -> PreTrainedModel:
    """The trainer some updates ago."""
    older = sharp_model()
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in older.parameters():
            weight.add_(0.05 * weight.std() * torch.randn(weight.shape, generator=rng) if weight.ndim > 1 else 0.0)
    return older


@pytest.fixture(scope="module")
def rows(policy: PreTrainedModel) -> list[Row]:
    """Every grade under every setting: 21 rollouts of different lengths."""
    pairs = [(grade, name) for name in SETTINGS for grade in ("exact", "interval", "sampled")]
    return [
        sample_row(policy, f"{grade}/{name}", grade, SETTINGS[name], seed, length=6 + 2 * (seed % 7))
        for seed, (grade, name) in enumerate(pairs)
    ]


def read(rows: Sequence[Row], folder: Path, version: int | None = None) -> tuple[RolloutBatch, StoredLogits | None]:
    """Rows through the same reader as those of a shard, full logits through a side file."""
    stored = None
    if any("logits" in row for row in rows):
        file = folder / f"logits-{len(list(folder.iterdir()))}.parquet"
        with LogitsTableWriter(file, "float32") as writer:
            for row in rows:
                if "logits" in row:
                    writer.add(row["rollout_id"], row["logits"])
        stored = StoredLogits([file])
    names = dict.fromkeys(name for row in rows for name in row if name != "logits")
    columns = {name: pa.array([row.get(name) for row in rows], ROLLOUT_COLUMNS[name].type) for name in names}
    rules = RowRules(vocab_size=VOCAB, logits=stored, stored_trainer=version is not None)
    batch, errors = read_rows(pa.RecordBatch.from_pydict(columns), "memory", np.arange(len(rows)), rules)
    assert errors == []
    return batch, stored


def score(
    rows: Sequence[Row], model: TrainerModel, folder: Path, *, max_tokens: int = 64, head_rows: int = 5
) -> tuple[RolloutBatch, TokenScores]:
    batch, stored = read(rows, folder)
    return batch, Scorer(model, stored, max_tokens=max_tokens, head_rows=head_rows).score(batch)


# --- the loop


def kl(p: np.ndarray, q: np.ndarray) -> float:
    there = p > 0
    return float((p[there] * np.log(p[there] / q[there])).sum()) if (q[there] > 0).all() else math.inf


def entropy(p: np.ndarray) -> float:
    return -float((p[p > 0] * np.log(p[p > 0])).sum())


def bounds(p: dict[int, float], floor: float, q: np.ndarray) -> dict[str, float]:
    """By their formulas, from the probabilities of S, the smallest listed one, and the trainer's distribution."""
    r, s = max(0.0, 1 - sum(p.values())), 1 - sum(q[i] for i in p)
    known = sum(value * math.log(value / q[i]) for i, value in p.items())
    gap = sum(abs(value - q[i]) for i, value in p.items())
    worst, left = 0.0, r
    for value in sorted(q[i] for i in range(len(q)) if i not in p):
        mass = min(floor, left)
        worst, left = worst + (mass * math.log(mass / value) if mass > 0 else 0.0), left - mass
    lower = known + (r * math.log(r / s) if r > 0 else 0.0)
    return {
        "kl_lower": lower,
        "kl_upper": known + worst,
        "tv_lower": (gap + abs(r - s)) / 2,
        "tv_upper": (gap + r + s) / 2,
    }


def loop(row: Row, trainer: PreTrainedModel, grade: str) -> dict[str, np.ndarray]:
    """Every per-token column of one row, and `rollout_logprobs`."""
    length, sampling = len(row["response_ids"]), SETTINGS[row["rollout_id"].split("/")[1]]
    out = {name: np.full(length, np.nan) for name in (*TOKEN_SCORES, "rollout_logprobs")}
    raw = logits_alone(trainer, torch.tensor(row["prompt_ids"] + row["response_ids"])).double().numpy()
    compared_raw = grade != "exact" and sampling.logprobs_mode == "raw"
    for t, token in enumerate(row["response_ids"]):
        if not row["response_mask"][t]:
            continue
        logq = log_softmax(raw[len(row["prompt_ids"]) - 1 + t] / (1.0 if compared_raw else sampling.temperature))
        found = {"trainer_logprobs": logq[token], "trainer_entropy": entropy(np.exp(logq))}
        found["rollout_logprobs"] = row["rollout_logprobs"][t]
        if grade == "exact":
            stored = row["logits"][t].astype(np.float64)
            pending = stored / sampling.temperature if sampling.logprobs_mode == "raw" else stored
            done = sampling.logprobs_mode == "processed"
            logp = log_softmax(pending if done else truncated(pending, sampling.top_p, sampling.top_k))
            p, q = np.exp(logp), np.exp(logq)
            found |= {"kl": kl(p, q), "kl_reverse": kl(q, p), "tv": float(np.abs(p - q).sum() / 2)}
            found |= {"rollout_entropy": entropy(p), "rollout_logprobs": logp[token]}
        if grade == "interval":
            listed = dict(zip(row["rollout_topk_ids"][t], np.exp(row["rollout_topk_logprobs"][t]), strict=True))
            floor = min(listed.values())
            found |= bounds({token: math.exp(row["rollout_logprobs"][t]), **listed}, floor, np.exp(logq))
        found["log_ratio"] = found["trainer_logprobs"] - found["rollout_logprobs"]
        for name, value in found.items():
            out[name][t] = value
    return out


def test_every_column_equals_a_float64_loop_at_every_grade_and_setting(
    rows: list[Row], trainer: PreTrainedModel, model: TrainerModel, tmp_path: Path
) -> None:
    batch, scores = score(rows, model, tmp_path)
    found = {**scores.tokens, "rollout_logprobs": scores.rollout_logprobs}
    for i, row in enumerate(rows):
        grade, setting = row["rollout_id"].split("/")
        part = slice(batch.response.offsets[i], batch.response.offsets[i + 1])
        assert batch.grade[i] == grade
        assert scores.audited_policy[i] == ("sampling" if grade == "exact" else AUDITED.get(setting, "sampling"))
        for name, wanted in loop(row, trainer, grade).items():
            loose = (
                {"atol": 2e-3} if name in ("kl_lower", "kl_upper") else {"atol": 5e-5 if name[:3] == "tv_" else 5e-6}
            )
            np.testing.assert_allclose(
                found[name][part], wanted, rtol=1e-5, **loose, err_msg=f"{row['rollout_id']} {name}", equal_nan=True
            )
        assert scores.num_disagreements[i] == 0


def test_rounding_widens_intervals_and_never_narrows_them(
    rows: list[Row], trainer: PreTrainedModel, model: TrainerModel, tmp_path: Path
) -> None:
    mine = [row for row in rows if row["rollout_id"].startswith("interval")]
    _, scores = score(mine, model, tmp_path)
    wanted = {name: np.concatenate([loop(row, trainer, "interval")[name] for row in mine]) for name in TOKEN_SCORES}
    there = ~np.isnan(wanted["kl_lower"])
    for name, sign in (("kl_lower", -1), ("tv_lower", -1), ("kl_upper", 1), ("tv_upper", 1)):
        assert (sign * (scores.tokens[name] - wanted[name])[there] >= -1e-9).all(), name


def test_the_exact_kl_lies_within_the_interval_of_the_same_rollout(
    policy: PreTrainedModel, model: TrainerModel, tmp_path: Path
) -> None:
    for setting in ("plain", "tempered", "processed"):
        whole, listed = (sample_row(policy, f"{g}/{setting}", g, SETTINGS[setting], 5) for g in ("exact", "interval"))
        (_, exact), (_, interval) = (score([row], model, tmp_path) for row in (whole, listed))
        there = whole["response_mask"]
        for name in ("kl", "tv"):
            value = exact.tokens[name][there]
            assert (interval.tokens[f"{name}_lower"][there] <= value).all()
            assert (value <= interval.tokens[f"{name}_upper"][there]).all()


# --- independence


@pytest.mark.parametrize("change", ["order", "alone", "large", "one-position-at-a-time", "one-row-at-a-time"])
def test_scores_do_not_depend_on_batch_order_or_padding(
    change: str, rows: list[Row], model: TrainerModel, tmp_path: Path
) -> None:
    batch, scores = score(rows, model, tmp_path)
    settings = {"large": {"max_tokens": 10**6, "head_rows": 10**4}, "one-position-at-a-time": {"head_rows": 1}}
    settings["one-row-at-a-time"] = {"max_tokens": 1}
    order = np.random.default_rng(0).permutation(len(rows)) if change == "order" else np.arange(len(rows))
    parts = [[rows[i]] for i in order] if change == "alone" else [[rows[i] for i in order]]
    again = [score(part, model, tmp_path, **settings.get(change, {})) for part in parts]
    for name in (*TOKEN_SCORES, "rollout_logprobs"):
        values = np.concatenate([{**one.tokens, "rollout_logprobs": one.rollout_logprobs}[name] for _, one in again])
        before = {**scores.tokens, "rollout_logprobs": scores.rollout_logprobs}[name]
        wanted = np.concatenate([before[batch.response.offsets[i] : batch.response.offsets[i + 1]] for i in order])
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=5e-6, err_msg=name, equal_nan=True)


def test_the_same_call_gives_the_same_bits(rows: list[Row], model: TrainerModel, tmp_path: Path) -> None:
    (_, first), (_, second) = (score(rows, model, tmp_path) for _ in range(2))
    for name in TOKEN_SCORES:
        np.testing.assert_array_equal(first.tokens[name], second.tokens[name])


# --- evidence


def test_logits_in_safetensors_give_what_the_long_table_gives(
    policy: PreTrainedModel, model: TrainerModel, tmp_path: Path
) -> None:
    mine = [sample_row(policy, f"exact/plain/{i}", "exact", SETTINGS["plain"], i, length=70) for i in range(2)]
    batch, scores = score(mine, model, tmp_path)
    save_file({row["rollout_id"]: torch.from_numpy(row["logits"]) for row in mine}, tmp_path / "logits-0.safetensors")
    stored = StoredLogits([tmp_path / "logits-0.safetensors"])
    again = Scorer(model, stored, max_tokens=64, head_rows=5).score(batch)
    for name in TOKEN_SCORES:
        np.testing.assert_array_equal(again.tokens[name], scores.tokens[name])


def test_rollout_logprobs_are_replaced_only_where_pi_roll_was_rebuilt_or_they_are_missing(
    rows: list[Row], model: TrainerModel, tmp_path: Path
) -> None:
    without = [{**row, "rollout_logprobs": None} for row in rows if row["rollout_id"] == "exact/plain"]
    mine = [row for row in rows if row["rollout_id"] not in {"exact/plain"}] + without
    batch, scores = score(mine, model, tmp_path)
    rebuilt = {name for name, new in zip(batch.rollout_id, scores.rebuilt, strict=True) if new}
    names = ("raw", "raw-tempered-only", "raw-top-k", "tempered-truncated", "plain")
    assert rebuilt == {f"exact/{name}" for name in names}
    kept = np.repeat(~scores.rebuilt, batch.response.lengths)
    np.testing.assert_array_equal(scores.rollout_logprobs[kept], batch.rollout_logprobs[kept])
    assert not np.isnan(scores.rollout_logprobs[~kept & batch.response_mask]).any()


def test_values_that_do_not_fit_the_stored_distribution_are_counted(
    rows: list[Row], model: TrainerModel, tmp_path: Path
) -> None:
    # GIVEN three values of each row a tenth off, and a fourth by less than rounding
    changed = []
    for row in (row for row in rows if row["rollout_id"] in {"exact/plain", "exact/tempered", "exact/raw"}):
        values, own = list(row["rollout_logprobs"]), [t for t, there in enumerate(row["response_mask"]) if there]
        for t, off in zip(own, (0.1, 0.1, 0.1, 5e-4), strict=False):
            values[t] -= off
        changed.append({**row, "rollout_logprobs": values})
    _, scores = score(changed, model, tmp_path)
    # THEN three are counted: of a raw row against the raw distribution, before it is rebuilt
    assert scores.num_disagreements.tolist() == [3, 3, 3]


@pytest.mark.parametrize("encoding", ["float16", "bfloat16"])
def test_rounding_of_stored_halves_is_no_disagreement_but_more_than_that_is(
    encoding: Any, rows: list[Row], model: TrainerModel, tmp_path: Path
) -> None:
    # GIVEN logits stored as halves beside log-probabilities of what they were rounded from, two of them half a nat off
    row = next(row for row in rows if row["rollout_id"] == "exact/plain")
    values = list(row["rollout_logprobs"])
    values[1], values[4] = values[1] - 0.5, values[4] - 0.5
    logits = torch.from_numpy(row["logits"])
    bits = logits.bfloat16().view(torch.uint16).numpy() if encoding == "bfloat16" else row["logits"]
    with LogitsTableWriter(tmp_path / "logits-0.parquet", encoding) as writer:
        writer.add(row["rollout_id"], bits)
    batch, _ = read([{**row, "rollout_logprobs": values}], tmp_path)
    stored = StoredLogits([tmp_path / "logits-0.parquet"])
    scores = Scorer(model, stored, max_tokens=64, head_rows=5).score(batch)
    assert float((logits - getattr(logits, {"float16": "half", "bfloat16": "bfloat16"}[encoding])()).abs().max()) > 1e-3
    assert scores.num_disagreements.tolist() == [2]


def test_a_listed_token_with_another_value_and_an_unlisted_one_above_the_list_are_counted(
    rows: list[Row], model: TrainerModel, tmp_path: Path
) -> None:
    row = next(row for row in rows if row["rollout_id"] == "interval/plain")
    values, token = list(row["rollout_logprobs"]), row["response_ids"]
    own = [t for t, there in enumerate(row["response_mask"]) if there]
    listed = next(t for t in own if token[t] in row["rollout_topk_ids"][t])
    outside = next(t for t in own if token[t] not in row["rollout_topk_ids"][t])
    values[listed] -= 0.1
    values[outside] = row["rollout_topk_logprobs"][outside][-1] + 0.1
    _, scores = score([{**row, "rollout_logprobs": values}], model, tmp_path)
    assert scores.num_disagreements.tolist() == [2]


def test_a_sampled_token_that_the_rebuilt_truncation_would_drop_is_put_back_and_counted(
    rows: list[Row], model: TrainerModel, tmp_path: Path
) -> None:
    # GIVEN a row whose first token is the least probable of all, though top_p is .9
    row = next(row for row in rows if row["rollout_id"] == "exact/raw")
    least = int(row["logits"][0].argmin())
    changed = {**row, "response_ids": [least, *row["response_ids"][1:]], "rollout_logprobs": None}
    _, scores = score([changed], model, tmp_path)
    # THEN it was evidently not truncated, and its ratio is a number
    assert scores.num_disagreements.tolist() == [1]
    assert np.isfinite(scores.tokens["log_ratio"][row["response_mask"]]).all()


@pytest.mark.parametrize(
    ("sampling", "grade", "wanted"),
    [
        (Sampling(), "exact", Comparison(1.0, None, "sampling")),
        (Sampling(0.6, 0.9, -1, "raw"), "exact", Comparison(0.6, (0.6, 0.9, -1), "sampling")),
        (Sampling(0.6, 0.9, -1, "tempered"), "exact", Comparison(0.6, (1.0, 0.9, -1), "sampling")),
        (Sampling(0.6, 1.0, -1, "tempered"), "exact", Comparison(0.6, None, "sampling")),
        (Sampling(0.6, 0.9, 5, "processed"), "exact", Comparison(0.6, None, "sampling")),
        (Sampling(0.6, 0.9, -1, "raw"), "interval", Comparison(1.0, None, "raw")),
        (Sampling(1.0, 0.9, -1, "raw"), "sampled", Comparison(1.0, None, "raw")),
        (Sampling(0.6, 0.9, -1, "tempered"), "sampled", Comparison(0.6, None, "tempered")),
        (Sampling(0.6, 1.0, -1, "tempered"), "sampled", Comparison(0.6, None, "sampling")),
        (Sampling(0.6, 0.9, 5, "processed"), "interval", Comparison(0.6, None, "sampling")),
    ],
)
def test_what_is_compared_with_what_follows_from_the_stage_of_the_stored_values(
    sampling: Sampling, grade: Any, wanted: Comparison
) -> None:
    assert comparison(sampling, grade) == wanted


def test_logits_that_are_not_a_number_are_refused_with_their_place(
    rows: list[Row], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    # GIVEN a checkpoint whose embedding of token 50 is damaged
    damaged = tiny_model("llama", seed=1)
    with torch.no_grad():
        damaged.get_input_embeddings().weight[50] = math.nan
    model = TrainerModel(find_checkpoint(save(damaged, tmp_path_factory.mktemp("damaged"))), device="cpu")
    row = {**rows[2], "prompt_ids": [50]}
    with pytest.raises(BadInput, match=r"memory, row 0 \(rollout_id=sampled/plain\).*not a number") as caught:
        score([row], model, tmp_path)
    assert "--dtype float32" in caught.value.next_step


def test_a_head_that_is_not_a_number_is_refused_when_the_model_is_loaded(tmp_path: Path) -> None:
    damaged = tiny_model("llama")
    with torch.no_grad():
        damaged.get_output_embeddings().weight[3] = math.nan
    with pytest.raises(BadInput, match="not a number"):
        TrainerModel(find_checkpoint(save(damaged, tmp_path)), device="cpu")


def test_rows_without_policy_tokens_are_not_scored(rows: list[Row], model: TrainerModel, tmp_path: Path) -> None:
    none = {**rows[2], "response_mask": [False] * len(rows[2]["response_ids"])}
    empty = {**rows[5], "prompt_ids": [], "response_ids": [], "response_mask": [], "rollout_logprobs": []}
    batch, scores = score([none, rows[8], empty], model, tmp_path)
    there = ~np.isnan(scores.tokens["trainer_logprobs"])
    np.testing.assert_array_equal(there, batch.response_mask)


def test_stored_trainer_values_stand_in_for_a_model(rows: list[Row], tmp_path: Path) -> None:
    own = [row for row in rows if "logits" not in row]
    given = [{**row, "trainer_logprobs": [-0.5] * len(row["response_ids"])} for row in own]
    batch, _ = read(given, tmp_path, version=1)
    scores = score_stored(batch)
    assert set(batch.grade) == {"sampled"}
    np.testing.assert_array_equal(np.isnan(scores.tokens["log_ratio"]), ~batch.response_mask)
    there = batch.response_mask
    np.testing.assert_allclose(scores.tokens["log_ratio"][there], -0.5 - batch.rollout_logprobs[there])
    assert all(np.isnan(scores.tokens[name]).all() for name in ("kl", "kl_lower", "trainer_entropy"))


# --- statistics of sequences


def statistics(values: np.ndarray) -> tuple[float, float, float, int]:
    """max, mean, sum, position of the first maximum, over what is not NaN."""
    there = [(float(value), t) for t, value in enumerate(values) if not math.isnan(value)]
    total, peak = sum(value for value, _ in there), max(value for value, _ in there)
    return peak, total / len(there), total, next(t for value, t in there if value == peak)


def test_sequence_statistics_equal_a_plain_loop(rows: list[Row], model: TrainerModel, tmp_path: Path) -> None:
    batch, scores = score(rows, model, tmp_path)
    columns = score_columns(batch, scores, None, rebuilds=True).to_pylist()
    for i, row in enumerate(columns):
        part = slice(batch.response.offsets[i], batch.response.offsets[i + 1])
        lr = scores.tokens["log_ratio"][part]
        values = {**{name: column[part] for name, column in scores.tokens.items()}, "ratio": np.exp(lr), "k1": -lr}
        values |= {"k2": lr**2 / 2, "k3": np.exp(lr) - 1 - lr, "abs_log_ratio": np.abs(lr)}
        for name in DIVERGENCES:
            found = [row[f"seq_{statistic}_{name}"] for statistic in ("max", "mean", "sum", "argmax")]
            if np.isnan(values[name]).all():
                assert found == [None] * 4, name
            else:
                assert found == pytest.approx(list(statistics(values[name])), rel=1e-9, abs=1e-12), name
        assert row["num_tokens"] == sum(rows[i]["response_mask"])
        assert row["grade"] == batch.grade[i]
        assert "rollout_topk_ids" not in row


def test_token_columns_are_null_outside_the_mask_and_where_the_grade_has_none(
    rows: list[Row], model: TrainerModel, tmp_path: Path
) -> None:
    batch, scores = score(rows, model, tmp_path)
    for row, source in zip(score_columns(batch, scores, None, rebuilds=True).to_pylist(), rows, strict=True):
        grade = row["grade"]
        assert (row["kl"] is None) == (grade != "exact")
        assert (row["kl_lower"] is None) == (grade != "interval")
        assert [value is not None for value in row["log_ratio"]] == source["response_mask"]
        assert [value is not None for value in row["trainer_entropy"]] == source["response_mask"]
        assert (row["rollout_logprobs_stored"] is None) == (
            not scores.rebuilt[batch.rollout_id.index(row["rollout_id"])]
        )


def test_zero_tokens_give_null_and_infinite_tokens_are_counted_where_they_stand(
    rows: list[Row], model: TrainerModel, tmp_path: Path
) -> None:
    none = {**rows[2], "response_mask": [False] * len(rows[2]["response_ids"])}
    batch, scores = score([none, rows[0]], model, tmp_path)
    # GIVEN a trainer that excludes what the rollout policy may sample, twice
    at = batch.response.offsets[1] + np.flatnonzero(rows[0]["response_mask"])[[1, 3]]
    scores.tokens["kl"][at] = np.inf
    with_versions = replace(batch, policy_version=np.array([np.nan, 3.0]))
    columns = score_columns(with_versions, scores, 10, rebuilds=False).to_pylist()
    assert [columns[0][f"seq_{statistic}_k3"] for statistic in ("max", "mean", "sum", "argmax")] == [None] * 4
    assert [row["num_tokens"] for row in columns] == [0, sum(rows[0]["response_mask"])]
    assert [row["num_infinite"] for row in columns] == [0, 2]
    assert [row["staleness"] for row in columns] == [None, 7]
    assert columns[1]["seq_max_kl"] == columns[1]["seq_mean_kl"] == math.inf
    assert columns[1]["seq_argmax_kl"] == at[0] - batch.response.offsets[1]
