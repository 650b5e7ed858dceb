"""How stored values and the trainer's are brought to the same footing: raw, tempered or processed."""

from __future__ import annotations

from dataclasses import dataclass

from trm_audit.rollout import AuditedPolicy, Grade, Sampling


@dataclass(frozen=True)
class Comparison:
    """How a row's stored values and the trainer's are brought to the same footing (raw, tempered, processed).

    Attributes:
        trainer_temperature: what the trainer's logits are divided by; they are never truncated.
        rebuild: temperature, top-p, top-k still to be applied to stored full logits; None if they are as sampled.
        audited_policy: which policy the figures then speak of.

    Worked instance: raw top-K values of a rollout at temperature 0.6: Comparison(1.0, None, "raw").
    """

    trainer_temperature: float
    rebuild: tuple[float, float, int] | None
    audited_policy: AuditedPolicy


def comparison(sampling: Sampling, grade: Grade | None) -> Comparison:
    """What can be compared with what, by the stage the values were stored at.

    Full logits can be tempered and truncated afterwards, so pi_roll is rebuilt. Raw top-K and sampled values cannot
    (the normaliser contains the unseen tail): they are compared with raw values of the trainer, and nothing is
    claimed about the tempered policy.
    """
    mode, temperature = sampling.logprobs_mode, sampling.temperature
    plain = temperature == 1.0 and not sampling.truncates
    if mode == "processed" or plain:
        return Comparison(temperature, None, "sampling")
    if grade == "exact":
        pending = temperature if mode == "raw" else 1.0
        needed = pending != 1.0 or sampling.truncates
        rebuild = (pending, sampling.top_p, sampling.top_k) if needed else None
        return Comparison(temperature, rebuild, "sampling")
    if mode == "tempered":
        return Comparison(temperature, None, "tempered" if sampling.truncates else "sampling")
    return Comparison(1.0, None, "raw")
