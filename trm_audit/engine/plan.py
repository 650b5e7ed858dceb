"""Who goes together into one forward. Holds no tensor."""

from __future__ import annotations

from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], max_tokens: int, *, alone: bool = False) -> list[list[int]]:
    """Rows in groups of similar length whose padded size stays under a token budget.

    Args:
        lengths: [rows] tokens of each row (prompt and response).
        max_tokens: largest rows x longest of a group; a longer single row goes alone.
        alone: one row a group, for models whose positions depend on the longest row of the batch.

    Returns:
        Row numbers, longest first, ties in row order; every row of a positive length once. What a group contains
        depends on the lengths alone, so the same rows are always scored together.
    """
    order = sorted((row for row in range(len(lengths)) if lengths[row] > 0), key=lambda row: (-lengths[row], row))
    groups: list[list[int]] = []
    for row in order:
        fits = groups and not alone and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens
        if fits:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
