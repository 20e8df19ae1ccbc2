"""Several draft methods at once: the tree that promises the most accepted tokens is verified.

What a method promises is measured against what came true. Every method that drafted is measured at every
step, whether its tree was the one or not: the tokens of the step are known to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence as TokenIds
from typing import final

from outpace.batch import Batch, TargetOutput, Verdict
from outpace.request import Sequence
from outpace.runtime.streams import StreamPass
from outpace.spec.proposer import Price, Proposer
from outpace.tree import DraftTree

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


@final
class Several(Proposer):
    """Asks every method and takes the best tree for each sequence; among equals the first method's.

    A request that names a method gets drafts of that one alone.
    """

    def __init__(self, proposers: dict[str, Proposer]) -> None:
        """Joins methods.

        Args:
            proposers: By name, in order of preference.
        """
        self._proposers = proposers
        self._calibrations = [Calibration() for _ in proposers]
        self._drafted: dict[str, list[DraftTree]] = {}  # of the present step: a tree per method

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """See Proposer."""
        wanted = [s.request.speculation.method for s in sequences]
        every = [
            proposer.propose(
                sequences,
                [
                    limit if method in (None, name) else 0
                    for limit, method in zip(limits, wanted, strict=True)
                ],
            )
            for name, proposer in self._proposers.items()
        ]
        trees = [list(of_one) for of_one in zip(*every, strict=True)]
        self._drafted = {
            s.id: of_one for s, of_one in zip(sequences, trees, strict=True) if any(map(len, of_one))
        }
        return [self._best(of_one) for of_one in trees]

    def streams(self, batch: Batch, price: Price) -> StreamPass | None:
        """See Proposer; the first method's that has some."""
        passes = (proposer.streams(batch, price) for proposer in self._proposers.values())
        return next((found for found in passes if found is not None), None)

    def observe(self, batch: Batch, target: TargetOutput, verdict: Verdict) -> None:
        """See Proposer."""
        for entry, decision in zip(batch.entries, verdict.decisions, strict=True):
            if decision is not None:
                for method, tree in enumerate(self._drafted.get(entry.sequence.id, ())):
                    self._calibrations[method].observe(tree, decision.token_ids)
        self._drafted = {}
        for proposer in self._proposers.values():
            proposer.observe(batch, target, verdict)

    def release(self, sequence_id: str) -> None:
        """See Proposer."""
        self._drafted.pop(sequence_id, None)
        for proposer in self._proposers.values():
            proposer.release(sequence_id)

    def _best(self, trees: list[DraftTree]) -> DraftTree:
        promised = [c.accepted(tree) for c, tree in zip(self._calibrations, trees, strict=True)]
        return trees[promised.index(max(promised))]
