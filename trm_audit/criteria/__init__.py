"""From sequence scores to verdicts: thresholds, expressions, and what they say about rows. No files, no torch."""
