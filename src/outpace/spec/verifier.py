"""From the target's logits to the tokens of a step: which drafts are accepted, and what follows them."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import final

import torch

from outpace.batch import Batch, BatchEntry, Decision, TargetOutput, Verdict
from outpace.config import SpeculativeConfig
from outpace.device import indices
from outpace.kernels import Kernels
from outpace.sampling import Noise, SampleRow, choose, target_logits, token_logprobs, uniforms
from outpace.tree import DraftTree

_Found = tuple[tuple[int, ...], int]  # an accepted path and the token behind it


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
        return _verdict(batch, [_follow(entry, chosen) for entry in batch.entries], target.logits)


@final
class RatioVerifier(Verifier):
    """Accepts a drafted token with probability min(1, p / q); else draws from what is left of p.

    Leviathan et al. 2023 and Chen et al. 2023 for chains; siblings are tried one after the other, as by Miao
    et al. 2024 (SpecInfer). The tokens follow the target's distribution whatever is drafted. Unlike under
    the match rule, which ones they are depends on the draft, unless the request is greedy.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def verify(self, batch: Batch, target: TargetOutput, allowed: torch.Tensor | None = None) -> Verdict:
        """See Verifier."""
        rows = rows_to_sample(batch)
        device = target.logits.device
        # Each acceptance hangs on the one before, so the host decides, over distributions that come whole.
        wanted = target_logits(target.logits, rows, allowed, kernels=self._kernels).cpu()
        largest = max((len(entry.tree) for entry in batch.entries), default=0)
        numbers = uniforms(rows, largest, Noise.ACCEPTANCE).tolist()
        found: list[_Found | None] = []
        for entry in batch.entries:
            if entry.first_sample is None:
                found.append(None)
                continue
            own = slice(entry.first_sample, entry.first_sample + 1 + len(entry.tree))
            path, left = ratio_path(entry.tree, rows[own], wanted[own], numbers[own])
            found.append((path, self._draw(left.to(device), rows[_last(entry, path)])))
        return _verdict(batch, found, target.logits)

    def _draw(self, p: torch.Tensor, row: SampleRow) -> int:
        """A token from p [vocab]."""
        logits = p.log().float().unsqueeze(0)
        (token_id,) = choose(logits, [row], kernels=self._kernels, noise=Noise.RECOVERY)
        return token_id


@final
class SyntheticVerifier(Verifier):
    """Accepts drafts at given rates whatever they are: for benchmarks only, since answers mean nothing.

    All computation is real, and the token behind the accepted ones is the target's choice.
    """

    def __init__(self, kernels: Kernels, rates: Sequence[float]) -> None:
        """Sets the rates.

        Args:
            kernels: Who filters logits and chooses.
            rates: For each depth the probability that a path of at least this length is accepted.
        """
        self._kernels = kernels
        self._rates = rates

    def verify(self, batch: Batch, target: TargetOutput, allowed: torch.Tensor | None = None) -> Verdict:
        """See Verifier."""
        rows = rows_to_sample(batch)
        wanted = target_logits(target.logits, rows, allowed, kernels=self._kernels)
        chosen = choose(wanted, rows, kernels=self._kernels)
        numbers = uniforms(rows, 1, Noise.SYNTHETIC).squeeze(1).tolist()
        found: list[_Found | None] = []
        for entry in batch.entries:
            if entry.first_sample is None:
                found.append(None)
                continue
            num_accepted = sum(numbers[entry.first_sample] < rate for rate in self._rates)
            path = _first_path(entry.tree, num_accepted)
            found.append((path, chosen[_last(entry, path)]))
        return _verdict(batch, found, target.logits)


def load_verifier(config: SpeculativeConfig, kernels: Kernels) -> Verifier:
    """Builds the verifier that a config asks for."""
    match config.verification:
        case "match":
            return MatchVerifier(kernels)
        case "ratio":
            return RatioVerifier(kernels)
        case _:
            return SyntheticVerifier(kernels, config.synthetic_acceptance_rates or ())


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


def ratio_path(
    tree: DraftTree, rows: Sequence[SampleRow], wanted: torch.Tensor, numbers: Sequence[Sequence[float]]
) -> tuple[tuple[int, ...], torch.Tensor]:
    """The nodes that the ratio rule accepts, and what is left to draw the token behind them from.

    At each place p is the target's distribution. A child drawn from q is accepted with probability
    min(1, p / q) of its token; a rejected one leaves max(0, p - q), normalised, as p to the next. A child
    that was picked, not drawn, counts as drawn from a q that knows no other token.

    Args:
        tree: The draft.
        rows: What the root and each node is for.
        wanted: [1 + nodes, vocab] target logits.
        numbers: [1 + nodes, nodes] uniform in (0, 1); at [r, c] what decides about child c of place r.

    Returns:
        Node indices, root side first, and [vocab] float64 probabilities.
    """
    path: list[int] = []
    here = -1
    p = _distribution(wanted[0], rows[0])
    for node, (parent, token_id) in enumerate(zip(tree.parents, tree.token_ids, strict=True)):
        if parent != here:
            continue
        q = _point_mass(token_id, len(p)) if tree.probs is None else tree.probs[node].to(p)
        if numbers[here + 1][node] * float(q[token_id]) < float(p[token_id]):
            path.append(node)
            here = node
            p = _distribution(wanted[node + 1], rows[node + 1])
        else:
            left = (p - q).clamp_(min=0)
            p = left / left.sum() if left.any() else p  # nothing is left if only rounding told p from q
    return tuple(path), p


def _distribution(logits: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """[vocab] float64, what a row's token is drawn from; a greedy row has one token to draw."""
    if row.params.is_greedy:
        return _point_mass(int(logits.max(dim=0).indices), len(logits))
    return torch.softmax(logits, dim=0, dtype=torch.float64)


def _point_mass(token_id: int, vocab_size: int) -> torch.Tensor:
    mass = torch.zeros(vocab_size, dtype=torch.float64)
    mass[token_id] = 1
    return mass


def _first_path(tree: DraftTree, length: int) -> tuple[int, ...]:
    """The nodes reached by going to the first child, up to `length` times."""
    path: list[int] = []
    for node, parent in enumerate(tree.parents):
        if len(path) < length and parent == (path[-1] if path else -1):
            path.append(node)
    return tuple(path)


def _follow(entry: BatchEntry, chosen: list[int]) -> _Found | None:
    """The path of the choices, and the one at its end."""
    if entry.first_sample is None:
        return None
    root = entry.first_sample
    path = matched_path(entry.tree, chosen[root : root + 1 + len(entry.tree)])
    return path, chosen[_last(entry, path)]


def _last(entry: BatchEntry, path: tuple[int, ...]) -> int:
    """The row at the end of a path."""
    assert entry.first_sample is not None
    return entry.first_sample + (path[-1] + 1 if path else 0)


def _verdict(batch: Batch, found: Sequence[_Found | None], logits: torch.Tensor) -> Verdict:
    """The decisions, with log-probabilities where they are asked for: those of all entries in one go.

    Args:
        batch: What was computed.
        found: For each entry its accepted path and the token behind it, None where it does not sample.
        logits: [samples, vocab], the model's own.
    """
    decisions: list[Decision | None] = []
    asking: list[int] = []  # entries
    rows: list[int] = []
    token_ids: list[int] = []
    for index, (entry, of_entry) in enumerate(zip(batch.entries, found, strict=True)):
        if of_entry is None:
            decisions.append(None)
            continue
        path, token_id = of_entry
        decision = Decision(path, (*(entry.tree.token_ids[node] for node in path), token_id))
        decisions.append(decision)
        if entry.sequence.request.sampling.logprobs is not None:
            asking.append(index)
            rows += (_last(entry, path[:depth]) for depth in range(len(path) + 1))
            token_ids += decision.token_ids
    if asking:
        nums = [batch.entries[index].sequence.request.sampling.logprobs or 0 for index in asking]
        said = iter(token_logprobs(logits[indices(rows, logits.device)], token_ids, max(nums)))
        for index, num in zip(asking, nums, strict=True):
            asked = decisions[index]
            assert asked is not None
            own = itertools.islice(said, len(asked.token_ids))
            decisions[index] = replace(asked, logprobs=tuple(replace(at, top=at.top[:num]) for at in own))
    return Verdict(tuple(decisions))
