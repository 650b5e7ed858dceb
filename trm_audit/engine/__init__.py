"""Scoring with the training model: which checkpoint, who goes together, the forward, the scores."""
