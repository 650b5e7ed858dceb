"""From score shards to one summary, and from the summary to whoever reads it.

    score or training shard -> ScoreBatch -> SummaryBuilder (mergeable) -> AuditSummary -> terminal, JSON, gates

`AuditSummary` is computed once and holds every number; a renderer computes none of its own.
"""
