"""The one shape of a draft, whatever made it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

Node = TypeVar("Node")
# minus its probability, its rank, parent, depth, token, probability given the parent, where it leads
_Branch = tuple[float, int, int, int, int, float, Node]


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Draft tokens for one sequence: the continuations to be verified in one forward.

    Parents come before their children and nodes are ordered best first, so that any prefix is a valid
    tree and cutting is slicing. The root is not a node: it is the sequence's last known token.

    Attributes:
        parents: For each node the index of its parent, or -1 where the parent is the root. A chain is
            `(-1, 0, 1, ...)`.
        token_ids: For each node its token.
        confidence: For each node the drafter's own estimate that it is on the accepted path given that
            its parent is, in [0, 1]; None where the drafter has none.
        probs: [nodes, vocab], for each node the distribution q that its token was drawn from, given its
            parent and its siblings before it; None where tokens were not drawn but picked, which is never
            wrong. Only the ratio rule reads it. Its claim: the tokens were drawn with noise that nobody
            else uses but the match rule, and neither their number nor their order depends on what came.

    Raises:
        ValueError: They differ in length, or a node comes before its parent.
    """

    parents: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    confidence: tuple[float, ...] | None = None
    probs: torch.Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if len(self.parents) != len(self.token_ids):
            raise ValueError(f"{len(self.parents)} parents for {len(self.token_ids)} tokens")
        if self.confidence is not None and len(self.confidence) != len(self.token_ids):
            raise ValueError(f"{len(self.confidence)} confidences for {len(self.token_ids)} tokens")
        if self.probs is not None and len(self.probs) != len(self.token_ids):
            raise ValueError(f"{len(self.probs)} distributions for {len(self.token_ids)} tokens")
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ValueError(f"node {node} has parent {parent}: parents come before their children")

    @classmethod
    def chain(cls, token_ids: tuple[int, ...], confidence: tuple[float, ...] | None = None) -> DraftTree:
        """A tree of width one."""
        return cls(tuple(range(-1, len(token_ids) - 1)), token_ids, confidence)

    def __len__(self) -> int:
        return len(self.token_ids)

    def cut(self, num_nodes: int) -> DraftTree:
        """The best `num_nodes` nodes (or all, if there are fewer)."""
        if num_nodes >= len(self):
            return self
        confidence = None if self.confidence is None else self.confidence[:num_nodes]
        probs = None if self.probs is None else self.probs[:num_nodes]
        return DraftTree(self.parents[:num_nodes], self.token_ids[:num_nodes], confidence, probs)

    def keep(self, nodes: Sequence[int]) -> DraftTree:
        """The given nodes, in the given order, each after its parent; without `probs`, so as picked."""
        if len(nodes) == len(self) and all(node == place for place, node in enumerate(nodes)):
            return self
        places = {-1: -1} | {node: place for place, node in enumerate(nodes)}
        confidence = None if self.confidence is None else tuple(self.confidence[node] for node in nodes)
        return DraftTree(
            tuple(places[self.parents[node]] for node in nodes),
            tuple(self.token_ids[node] for node in nodes),
            confidence,
        )

    def best_first(self) -> DraftTree:
        """The same nodes, the most probable first, if the drafter knows; equal ones keep their order."""
        if self.confidence is None:
            return self
        probs: list[float] = []
        for parent, confidence in zip(self.parents, self.confidence, strict=True):
            probs.append(confidence * (probs[parent] if parent >= 0 else 1.0))
        return self.keep(sorted(range(len(self)), key=lambda node: -probs[node]))

    def paths(self) -> list[tuple[int, ...]]:
        """For each node the drafted tokens up to it, its own last."""
        paths: list[tuple[int, ...]] = []
        for parent, token_id in zip(self.parents, self.token_ids, strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token_id))
        return paths

    def is_chain(self) -> bool:
        """Whether every node's parent is the node before it."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def depths(self) -> list[int]:
        """Depth of each node: 1 for children of the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths


EMPTY_TREE = DraftTree()


def grow(
    root: Node,
    children: Callable[[Node], Iterable[tuple[int, float, Node]]],
    max_nodes: int,
    max_depth: int,
    min_prob: float = 0.0,
) -> DraftTree:
    """The most probable nodes of a tree that is known by its branches, best first.

    Args:
        root: Where the sequence stands.
        children: For a place its continuations: token, probability given the place, where it leads.
        max_nodes: Size limit.
        max_depth: Depth limit.
        min_prob: Least probability of a node, the product of those on its path.
    """
    parents: list[int] = []
    token_ids: list[int] = []
    confidence: list[float] = []
    order = itertools.count()  # ties: first seen first, which keeps parents before their children

    def branches(place: Node, prob: float, parent: int, depth: int) -> Iterator[_Branch[Node]]:
        if depth <= max_depth:
            for token_id, share, target in children(place):
                if prob * share >= min_prob:
                    yield -prob * share, next(order), parent, depth, token_id, share, target

    frontier = list(branches(root, 1.0, -1, 1))
    heapq.heapify(frontier)
    while frontier and len(token_ids) < max_nodes:
        negative, _, parent, depth, token_id, share, target = heapq.heappop(frontier)
        for branch in branches(target, -negative, len(token_ids), depth + 1):
            heapq.heappush(frontier, branch)
        parents.append(parent)
        token_ids.append(token_id)
        confidence.append(share)
    return DraftTree(tuple(parents), tuple(token_ids), tuple(confidence))
