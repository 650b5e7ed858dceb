"""Who goes together into one forward, and what is computed only once. Holds no tensor.

Rollouts of one prompt share it, turns of an agent share everything before them. The sequences of a window become a
forest: a node is a run of tokens common to all sequences below it. A plan is a list of steps, one forward each, and
says where in a step's hidden states the positions of each sequence are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from trm_audit.numerics.ragged import Ints

MIN_SHARED = 16
"""Common runs shorter than this are computed for each sequence: a node costs an attention call in every layer."""
MIN_SEGMENT = 64
"""A node is not cut for the sake of fewer tokens than this that would still fit into a step."""


@dataclass(frozen=True)
class Segment:
    """Tokens start..stop of a sequence, computed in one step; `shared` by later segments, which see them."""

    row: int
    start: int
    stop: int
    shared: bool = False


@dataclass(frozen=True)
class Span:
    """Positions start..start + count of a sequence are found at `at` and after it in a step's hidden states."""

    row: int
    start: int
    count: int
    at: int


@dataclass(frozen=True)
class Step:
    """One forward.

    Attributes:
        segments: what is computed: laid end to end if `width` is 0, otherwise each a row of a batch of that width.
        spans: what its hidden states, [segments x width or tokens, H], are hidden states of.
        width: padded width.
        rows: rows of the padded batch; those beyond the segments are filler.
        after: the step whose key-value cache this one continues, or -1.
        uses: how many later steps continue this one's cache.
    """

    segments: tuple[Segment, ...]
    spans: tuple[Span, ...]
    width: int = 0
    rows: int = 0
    after: int = -1
    uses: int = 0


@dataclass
class Node:
    """Tokens start..stop common to some sequences.

    Attributes:
        row: a sequence that contains them; rows: all of those.
        parent: number of the node before it, or -1.
    """

    row: int
    start: int
    stop: int
    parent: int = -1
    rows: list[int] = field(default_factory=list)
    children: list[int] = field(default_factory=list)


def prefix_forest(rows: Sequence[Ints], *, shared: bool = True, min_shared: int = MIN_SHARED) -> list[Node]:
    """The sequences as a forest of common prefixes.

    Args:
        rows: token ids of each sequence; empty ones are left out.
        shared: False makes each sequence a tree of its own.
        min_shared: shortest run worth a node.

    Returns:
        Nodes in depth-first order, parents before children, those with the lowest row first. A sequence that is the
        beginning of another has no node of its own.
    """
    nodes: list[Node] = []
    order = sorted((row for row in range(len(rows)) if len(rows[row])), key=lambda row: _sort_key(rows[row]))
    path: list[int] = []  # nodes of the sequence before
    for place, row in enumerate(order):
        common = _common(rows[order[place - 1]], rows[row]) if shared and place else 0
        while path and nodes[path[-1]].start >= common:
            path.pop()
        if path and common < nodes[path[-1]].stop:
            _cut(nodes, path[-1], common)
        if common < len(rows[row]) or not path:
            nodes.append(Node(row, common, len(rows[row]), path[-1] if path else -1))
            if path:
                nodes[path[-1]].children.append(len(nodes) - 1)
            path.append(len(nodes) - 1)
        for node in path:
            nodes[node].rows.append(row)
    return _in_order(nodes, min_shared)


def _sort_key(row: Ints) -> bytes:
    return row.astype(">u4").tobytes()


def _common(a: Ints, b: Ints) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _cut(nodes: list[Node], at: int, stop: int) -> None:
    """Ends a node at `stop`; its rest becomes its child."""
    node = nodes[at]
    rest = Node(node.row, stop, node.stop, at, list(node.rows), node.children)
    nodes.append(rest)
    for child in rest.children:
        nodes[child].parent = len(nodes) - 1
    node.stop, node.children = stop, [len(nodes) - 1]


def _in_order(nodes: list[Node], min_shared: int) -> list[Node]:
    """The forest without what is not worth a node, depth first, lowest row first, numbered anew."""
    out: list[Node] = []
    stack = [(number, -1) for number in _by_first_row(nodes, [n for n in range(len(nodes)) if nodes[n].parent < 0])]
    while stack:
        number, parent = stack.pop()
        node = nodes[number]
        if len(node.children) == 1 or (node.children and node.stop - node.start < min_shared):
            _dissolve(nodes, node)
            stack.extend((child, parent) for child in _by_first_row(nodes, node.children))
            continue
        out.append(Node(node.row, node.start, node.stop, parent, sorted(node.rows)))
        if parent >= 0:
            out[parent].children.append(len(out) - 1)
        stack.extend((child, len(out) - 1) for child in _by_first_row(nodes, node.children))
    return out


def _dissolve(nodes: list[Node], node: Node) -> None:
    """Gives a node's tokens to each of its children; sequences that end in it go with the first."""
    ending = set(node.rows)
    for child in node.children:
        nodes[child].start = node.start
        ending -= set(nodes[child].rows)
    nodes[node.children[0]].rows += sorted(ending)


def _by_first_row(nodes: list[Node], numbers: Sequence[int]) -> list[int]:
    """Last first, as a stack wants them."""
    return sorted(numbers, key=lambda number: min(nodes[number].rows), reverse=True)


def tree_steps(forest: Sequence[Node], lengths: Sequence[int], max_tokens: int) -> list[Step]:
    """A forest laid end to end, depth first, at most `max_tokens` tokens a step; nodes are cut where a step is full.

    Args:
        forest: from `prefix_forest`.
        lengths: tokens of each sequence.
    """
    steps: list[list[tuple[int, Segment]]] = [[]]
    room = max_tokens
    for number, node in enumerate(forest):
        start = node.start
        while start < node.stop:
            if room < min(node.stop - start, MIN_SEGMENT, max_tokens):
                steps.append([])
                room = max_tokens
            stop = min(node.stop, start + room)
            segment = Segment(node.row, start, stop, shared=stop < node.stop or bool(node.children))
            steps[-1].append((number, segment))
            room -= stop - start
            start = stop
    return [_flat(forest, lengths, step) for step in steps if step]


def _flat(forest: Sequence[Node], lengths: Sequence[int], segments: Sequence[tuple[int, Segment]]) -> Step:
    spans, at = [], 0
    for number, segment in segments:
        spans += _spans(forest[number], segment, lengths, at)
        at += segment.stop - segment.start
    return Step(tuple(segment for _, segment in segments), tuple(spans))


def _spans(node: Node, segment: Segment, lengths: Sequence[int], at: int) -> list[Span]:
    """One span for each sequence that runs through a segment."""
    return [
        Span(row, segment.start, min(segment.stop, lengths[row]) - segment.start, at)
        for row in node.rows
        if lengths[row] > segment.start
    ]


class _Batches:
    """Steps that are padded batches, each perhaps with the key-value cache of an earlier one."""

    def __init__(self, lengths: Sequence[int], max_tokens: int) -> None:
        self._lengths, self._max_tokens = lengths, max_tokens
        self.steps: list[Step] = []

    def add(self, segments: Sequence[tuple[Node, Segment]], width: int, rows: int, after: int = -1) -> int:
        """A batch; returns its number."""
        spans = [
            span
            for place, (node, segment) in enumerate(segments)
            for span in _spans(node, segment, self._lengths, place * width)
        ]
        if after >= 0:
            self.steps[after] = replace(self.steps[after], uses=self.steps[after].uses + 1)
        self.steps.append(Step(tuple(segment for _, segment in segments), tuple(spans), width, rows, after))
        return len(self.steps) - 1

    def node(self, node: Node, after: int = -1, most: int | None = None) -> int:
        """A node alone, at most `most` tokens at a time (None: `max_tokens`); returns the number of the last step."""
        most = most or self._max_tokens
        for start in range(node.start, node.stop, most):
            segment = Segment(node.row, start, min(start + most, node.stop))
            after = self.add([(node, segment)], segment.stop - start, 1, after)
        return after

    def leaves(self, nodes: Sequence[Node], after: int) -> None:
        """Nodes that nothing follows: those of similar length together."""
        lengths = [node.stop - node.start for node in nodes]
        for group in micro_batches(lengths, self._max_tokens):
            width = lengths[group[0]]
            if width > self._max_tokens:
                self.node(nodes[group[0]], after)
            else:
                mine = [(nodes[i], Segment(nodes[i].row, nodes[i].start, nodes[i].stop)) for i in group]
                self.add(mine, width, len(group), after)


def fork_steps(forest: Sequence[Node], lengths: Sequence[int], max_tokens: int) -> list[Step]:
    """A forest with one key-value cache for each node that has children, copied for what follows it.

    Such nodes are computed one by one, the others below the same node together, padded on the right.
    """
    out = _Batches(lengths, max_tokens)
    last = {-1: -1}  # node -> the step that ends it
    out.leaves([node for node in forest if node.parent < 0 and not node.children], -1)
    for number, node in enumerate(forest):
        if node.children:
            last[number] = out.node(node, last[node.parent])
            out.leaves([forest[child] for child in node.children if not forest[child].children], last[number])
    return out.steps


def padded_steps(lengths: Sequence[int], max_tokens: int, *, constant: bool = False, pieces: bool = True) -> list[Step]:
    """Sequences of similar length padded together, nothing shared.

    Args:
        lengths: tokens of each sequence; those of length 0 are left out.
        max_tokens: largest rows x width of a step; a longer sequence goes alone, piece by piece.
        constant: widths from a fixed grid, and a number of rows that depends on the width alone, filled up with filler:
            what a sequence is computed with then has the same shape whatever else there is.
        pieces: False computes a long sequence whole, for models that cannot continue.
    """
    out = _Batches(lengths, max_tokens)
    wide = [_grid(n) if constant and n else n for n in lengths]
    for group in micro_batches(wide, max_tokens, equal=constant):
        nodes = [Node(row, 0, lengths[row], rows=[row]) for row in sorted(group)]
        width = wide[group[0]]
        if lengths[group[0]] > max_tokens:
            out.node(nodes[0], most=None if pieces else lengths[group[0]])
        else:
            rows = max(1, max_tokens // width) if constant else len(group)
            out.add([(node, Segment(node.row, 0, node.stop)) for node in nodes], width, rows)
    return out.steps


def micro_batches(lengths: Sequence[int], max_tokens: int, *, equal: bool = False) -> list[list[int]]:
    """Rows in groups of similar length whose padded size stays under a token budget.

    Args:
        lengths: [rows] tokens of each row.
        max_tokens: largest rows x longest of a group; a longer single row goes alone.
        equal: rows of one length only.

    Returns:
        Row numbers, longest first, ties in row order; every row of a positive length once.
    """
    order = sorted((row for row in range(len(lengths)) if lengths[row] > 0), key=lambda row: (-lengths[row], row))
    groups: list[list[int]] = []
    for row in order:
        group = groups[-1] if groups else []
        longest = lengths[group[0]] if group else 0
        similar = lengths[row] == longest or not equal
        if group and similar and longest * (len(group) + 1) <= max_tokens:
            group.append(row)
        else:
            groups.append([row])
    return groups


def _grid(n: int) -> int:
    """The next length of a grid that is at most an eighth coarse."""
    step = max(16, 1 << max(0, n.bit_length() - 4))
    return -(-n // step) * step
