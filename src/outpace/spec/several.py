"""Several draft methods at once: each sequence goes on with the tree of one of them.

A policy may say whom to ask and whose tree to take. Without its word every method is asked, and the tree
that promises the most accepted tokens is taken. What a method promises is measured against what came true.
Every method that drafted is measured at every step, whether its tree was the one or not: the tokens of the
step are known to all of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass
from typing import final

from outpace.batch import Batch, TargetOutput, Verdict
from outpace.policy.base import MethodRecord
from outpace.request import Sequence
from outpace.runtime.streams import StreamPass
from outpace.spec.proposer import Prices, Proposer
from outpace.tree import EMPTY_TREE, DraftTree

_KEPT = 0.99  # weight of what was seen before, at each observation: about the last hundred count
_PRIOR = 4.0  # expected acceptances that a depth's ratio starts with, at the ratio of the depth before


@final
class Calibration:
    """How often a method is right, by depth, against how often it expects to be.

    Where a node is reached the sum of its children's confidences is the expected number of acceptances, 0
    or 1 is the actual one. Their ratio corrects a confidence, so that an over-confident method does not win.
    A method without confidences expects 1 at every node, and the ratio is its acceptance at that depth.
    """

    def __init__(self) -> None:
        self._expected: list[float] = []
        self._actual: list[float] = []

    def accepted(self, tree: DraftTree) -> float:
        """The expected number of accepted tokens: over all nodes the probability of their path."""
        ratios = self._ratios()
        reached: list[float] = []
        for parent, depth, confidence in zip(tree.parents, tree.depths(), _confidences(tree), strict=True):
            ratio = ratios[min(depth, len(ratios) - 1)]
            reached.append((reached[parent] if parent >= 0 else 1.0) * min(1.0, ratio * confidence))
        return sum(reached)

    def observe(self, tree: DraftTree, token_ids: TokenIds[int]) -> None:
        """Learns from what came.

        Args:
            tree: What was drafted.
            token_ids: What the target says; nothing is known of deeper nodes.
        """
        confidences = _confidences(tree)
        here: int | None = -1
        for depth, token_id in enumerate(token_ids):
            children = [node for node, parent in enumerate(tree.parents) if parent == here]
            if not children:
                return
            here = next((node for node in children if tree.token_ids[node] == token_id), None)
            self._count(depth, sum(confidences[node] for node in children), here is not None)
            if here is None:
                return

    def _count(self, depth: int, expected: float, right: bool) -> None:
        if depth == len(self._expected):
            self._expected.append(0.0)
            self._actual.append(0.0)
        self._expected[depth] = _KEPT * self._expected[depth] + expected
        self._actual[depth] = _KEPT * self._actual[depth] + right

    def _ratios(self) -> list[float]:
        """Actual over expected by depth; where little was seen, near that of the depth before."""
        ratios = [1.0]
        for expected, actual in zip(self._expected, self._actual, strict=True):
            ratios.append((actual + _PRIOR * ratios[-1]) / (expected + _PRIOR))
        return ratios


def _confidences(tree: DraftTree) -> list[float]:
    """The method's own, or of a method that has none an equal share for each of a node's children."""
    if tree.confidence is not None:
        return list(tree.confidence)
    return [1.0 / tree.parents.count(parent) for parent in tree.parents]


def outcome(tree: DraftTree, token_ids: TokenIds[int]) -> tuple[int, tuple[int, ...]]:
    """What would have become of a tree, had it been verified.

    Args:
        tree: What was drafted.
        token_ids: What the target says; nothing is known of deeper nodes.

    Returns:
        The leading nodes of which it is known, and those of them that would have been accepted.
    """
    length = next((n for n, depth in enumerate(tree.depths()) if depth > len(token_ids)), len(tree))
    path: list[int] = []
    here = -1
    for node in range(length):
        if tree.parents[node] == here and tree.token_ids[node] == token_ids[len(path)]:
            path.append(node)
            here = node
            if len(path) == len(token_ids):
                break
    return length, tuple(path)


@dataclass(slots=True, eq=False)
class _Asked:
    """What a method was asked for in the present step, per sequence, and what came of it."""

    limits: list[int]
    trees: list[DraftTree]
    seconds: float


@final
class Several(Proposer):
    """Asks methods and goes on with the tree of one of them for each sequence.

    A request that names a method gets drafts of that one alone.

    Attributes:
        records: What each method that was asked did in the step that was observed last.
    """

    def __init__(self, proposers: dict[str, Proposer]) -> None:
        """Joins methods.

        Args:
            proposers: By name, in order of preference.
        """
        self._proposers = proposers
        self._calibrations = {name: Calibration() for name in proposers}
        self._ids: list[str] = []  # of the present step, as are these:
        self._asked: dict[str, _Asked] = {}
        self._taken: list[str] = []
        self._streaming: str | None = None  # whose streams are in its pass
        self.records: tuple[MethodRecord, ...] = ()

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """See Proposer: asks every method, and takes the best tree; among equals the first method's."""
        self.ask(sequences, limits)
        return self.take()

    def ask(
        self, sequences: list[Sequence], limits: list[int], wanted: Mapping[str, list[int]] | None = None
    ) -> dict[str, list[DraftTree]]:
        """Drafts with some or all methods.

        Args:
            sequences: Those that will sample in this step.
            limits: Most nodes allowed for each.
            wanted: For each method to ask the nodes allowed per sequence; None: `limits` of every method.

        Returns:
            By method that was asked a tree per sequence.
        """
        self._ids = [sequence.id for sequence in sequences]
        own = [sequence.request.speculation.method for sequence in sequences]
        self._asked = {}
        for name, proposer in self._proposers.items():
            allowed = limits if wanted is None else wanted.get(name, [0] * len(limits))
            mine = [k if method in (None, name) else 0 for k, method in zip(allowed, own, strict=True)]
            if any(mine):
                begin = time.perf_counter()
                trees = proposer.propose(sequences, mine)
                self._asked[name] = _Asked(mine, trees, time.perf_counter() - begin)
        return {name: asked.trees for name, asked in self._asked.items()}

    def take(self, picked: list[str] | None = None) -> list[DraftTree]:
        """The trees to go on with.

        Args:
            picked: Whose for each sequence; None: of the method that promises most.
        """
        if not self._asked:
            self._taken = [""] * len(self._ids)
            return [EMPTY_TREE] * len(self._ids)
        self._taken = list(map(self._best, range(len(self._ids)))) if picked is None else picked
        return [self._asked[name].trees[number] for number, name in enumerate(self._taken)]

    def streams(self, batch: Batch, prices: Prices) -> StreamPass | None:
        """See Proposer; the first method's that has some."""
        self._streaming = None
        for name, proposer in self._proposers.items():
            if (found := proposer.streams(batch, prices)) is not None:
                self._streaming = name
                return found
        return None

    def observe(self, batch: Batch, target: TargetOutput, verdict: Verdict) -> None:
        """See Proposer."""
        came = {
            entry.sequence.id: decision.token_ids
            for entry, decision in zip(batch.entries, verdict.decisions, strict=True)
            if decision is not None
        }
        self.records = tuple(self._record(name, asked, came) for name, asked in self._asked.items())
        for name, asked in self._asked.items():
            for key, tree in zip(self._ids, asked.trees, strict=True):
                self._calibrations[name].observe(tree, came[key])
        self._ids, self._asked = [], {}
        for proposer in self._proposers.values():
            proposer.observe(batch, target, verdict)

    def release(self, sequence_id: str) -> None:
        """See Proposer."""
        for proposer in self._proposers.values():
            proposer.release(sequence_id)

    def reset_prefix_cache(self) -> None:
        """See Proposer."""
        for proposer in self._proposers.values():
            proposer.reset_prefix_cache()

    def _record(self, name: str, asked: _Asked, came: Mapping[str, TokenIds[int]]) -> MethodRecord:
        outcomes = [outcome(tree, came[key]) for key, tree in zip(self._ids, asked.trees, strict=True)]
        return MethodRecord(
            name=name,
            limits=tuple(asked.limits),
            drafts=tuple(asked.trees),
            lengths=tuple(length for length, _ in outcomes),
            paths=tuple(path for _, path in outcomes),
            taken=tuple(taken == name for taken in self._taken),
            seconds=asked.seconds,
            has_streams=name == self._streaming,
        )

    def _best(self, number: int) -> str:
        """Who promises most for a sequence."""
        promised = {
            name: self._calibrations[name].accepted(asked.trees[number])
            for name, asked in self._asked.items()
        }
        return max(promised, key=promised.__getitem__)
