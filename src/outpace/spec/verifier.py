"""From the target's logits to the tokens of a step: which drafts are accepted, and what follows them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch

from outpace.batch import Batch, BatchEntry, Decision, TargetOutput, Verdict
from outpace.kernels import Kernels
from outpace.sampling import SampleRow, choose, target_logits, token_logprobs
from outpace.tree import DraftTree


class Verifier(ABC):
    """Decides which drafts to accept."""

    @abstractmethod
    def verify(self, batch: Batch, target: TargetOutput, allowed: torch.Tensor | None = None) -> Verdict:
        """Accepts a path of each tree and adds one token from the target.

        Args:
            batch: What was computed.
            target: Its logits; not modified.
            allowed: [samples, vocab] bool, False where a grammar forbids a token; None allows all.

        Returns:
            One decision per entry, with at least one token where the entry samples, else None.
        """


@final
class MatchVerifier(Verifier):
    """Accepts a drafted token exactly where the target would have chosen it.

    The target's choice at a node is the argmax of its logits and of noise that depends on seed and
    position alone. So the answer is the same whatever was drafted, and greedy and sampled decoding,
    chains and trees, need no special case.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def verify(self, batch: Batch, target: TargetOutput, allowed: torch.Tensor | None = None) -> Verdict:
        """See Verifier."""
        rows = rows_to_sample(batch)
        wanted = target_logits(target.logits, rows, allowed, kernels=self._kernels)
        chosen = choose(wanted, rows, kernels=self._kernels)
        return Verdict(tuple(_decide(entry, chosen, target.logits) for entry in batch.entries))


def rows_to_sample(batch: Batch) -> list[SampleRow]:
    """What each row of the batch's logits is for: the root of each sampling sequence, then its nodes."""
    rows: list[SampleRow] = []
    for entry in batch.entries:
        if entry.first_sample is None:
            continue
        assert entry.first_sample == len(rows), "logits follow the order of the entries"
        rows.append(SampleRow(entry.sequence))
        for parent, token_id in zip(entry.tree.parents, entry.tree.token_ids, strict=True):
            ancestors = rows[entry.first_sample + 1 + parent].drafted
            rows.append(SampleRow(entry.sequence, (*ancestors, token_id)))
    return rows


def matched_path(tree: DraftTree, chosen: Sequence[int]) -> tuple[int, ...]:
    """The nodes reached from the root by going to the child whose token was chosen, while there is one.

    Args:
        tree: The draft.
        chosen: The target's choice at the root, then at each node.

    Returns:
        Node indices, root side first.
    """
    path: list[int] = []
    here = -1
    # one pass is enough: children come after their parent
    for node, (parent, token_id) in enumerate(zip(tree.parents, tree.token_ids, strict=True)):
        if parent == here and token_id == chosen[here + 1]:
            path.append(node)
            here = node
    return tuple(path)


def _decide(entry: BatchEntry, chosen: list[int], logits: torch.Tensor) -> Decision | None:
    if entry.first_sample is None:
        return None
    root = entry.first_sample
    path = matched_path(entry.tree, chosen[root : root + 1 + len(entry.tree)])
    rows = [root, *(root + 1 + node for node in path)]
    token_ids = tuple(chosen[row] for row in rows)
    num_top = entry.sequence.request.sampling.logprobs
    logprobs = None if num_top is None else tuple(token_logprobs(logits[rows], token_ids, num_top))
    return Decision(path, token_ids, logprobs)
