"""Pure functions: no files, no model, nothing of ours imported from outside this folder."""
