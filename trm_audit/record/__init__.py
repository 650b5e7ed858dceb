"""Recording rollouts with evidence of the whole distribution while an engine samples: a few lines for each engine.

    from trm_audit.record import Recipe, RolloutWriter, evidence

    with RolloutWriter("rollouts/") as writer:
        ...  # tokens [n], and the logits [n, V] that they were drawn from
        found = evidence(logits, tokens, sampling)
        writer.add(prompt_ids=prompt, response_ids=tokens, evidence=found, sampling=sampling)

Engines have a recorder of their own: `record.vllm`, `record.transformers`, `record.llama_cpp`. None of them is loaded
from here, nor the engine.
"""

from trm_audit.record.evidence import Recipe, TokenEvidence, evidence
from trm_audit.record.writer import RolloutWriter
from trm_audit.rollout import Sampling

__all__ = ["Recipe", "RolloutWriter", "Sampling", "TokenEvidence", "evidence"]
