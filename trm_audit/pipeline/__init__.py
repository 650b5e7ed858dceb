"""The stages: which shards are left, the loop over them, publishing, resuming. No arithmetic, nothing printed."""
