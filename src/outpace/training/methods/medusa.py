"""Medusa-1 heads (Cai et al., "Medusa", 2024): head k guesses the token k after the next one.

Head k of the last hidden state h is `H_k (n + SiLU(W_k n + b_k))` with n = h / rms(h), W_k zero at first. In
the paper H_k is [vocab, h], begun as a copy of the target's output head H (`own_heads` here). By default it
is `H P_k` with H shared and frozen and P_k [h, h] begun as the identity: 2h² + h parameters instead of
h² + h + h·vocab, some forty times fewer for a small model. Either way a head begins as the target's own
guess. P_k is there since SiLU adds next to nothing below zero: without it a head could hardly take that guess
back.

The tree is the paper's: how often rank r of head k is right is measured on conversations that were not
trained on, and the nodes with the largest products along their path are taken, the best first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F

from outpace.config import setting
from outpace.models.draft_checkpoint import write_draft
from outpace.models.draft_vocab import DraftVocab
from outpace.spec.last_hidden import unit_rms
from outpace.training.losses import Teacher, draft_loss
from outpace.training.method import Recipe, Run, SampledSettings, TrainableDraft, TrainBatch, section
from outpace.training.trunk import Trunk
from outpace.tree import grow

_DECAY = 0.8  # weight of each head's loss against that of the head before


@dataclass(frozen=True)
class Settings(SampledSettings):
    """What can be chosen."""

    num_heads: int = setting(4, "Heads, and so the greatest depth of a draft")
    own_heads: bool = setting(False, "Whether each has an output head of its own, not the target's")
    num_nodes: int = setting(64, "Nodes of the tree that is kept; fewer are drafted where fewer are wanted")
    num_ranks: int = setting(8, "Most tokens of a head in the tree at one place")


class Medusa(TrainableDraft):
    """The heads.

    Attributes:
        weight: [heads, hidden, hidden], W.
        bias: [heads, hidden], b.
        output: [heads, tokens, hidden], H of their own, or [heads, hidden, hidden], P.
    """

    recipe = Recipe(lr=3e-3)

    def __init__(self, trunk: Trunk, run: Run, settings: Settings) -> None:
        """Heads that guess what the target guesses for the next token."""
        super().__init__()
        self._trunk, self._run, self._settings = trunk, run, settings
        self.hidden_layers = (trunk.config.num_layers,)
        heads, width = settings.num_heads, trunk.config.hidden_size
        self.weight = torch.nn.Parameter(torch.zeros(heads, width, width, device=trunk.device))
        self.bias = torch.nn.Parameter(torch.zeros(heads, width, device=trunk.device))
        self.vocab: DraftVocab = run.draft_vocab(settings, trunk)
        self._shared = self.vocab.rows(trunk.head_weight)  # [tokens, hidden]
        start = self._shared.float() if settings.own_heads else torch.eye(width, device=trunk.device)
        self.output = torch.nn.Parameter(start.repeat(heads, 1, 1))
        self._accuracies: list[list[float]] = []

    def loss(self, batch: TrainBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross entropy and divergence from the target of each head, the k-th weighted by 0.8^k."""
        total = torch.zeros((), device=self._trunk.device)
        metrics: dict[str, float] = {}
        rows = self._settings.rows(batch, self._run.seed)
        for k in range(self._settings.num_heads):
            hidden, targets, ahead = self._examples(batch, k, rows)
            teacher = Teacher(ahead, self._shared, self._settings.kl_weight)
            said = self._transform(hidden, k)
            loss, right = draft_loss(said, self._head(k), self.vocab, targets, teacher=teacher)
            count = max(1, len(targets))
            total = total + _DECAY ** (k + 1) * loss / count
            metrics[f"accuracy_{k + 1}"] = float(right.sum()) / count
        return total, metrics

    @torch.no_grad()
    def measure(self, batches: Iterable[TrainBatch]) -> dict[str, float]:
        """Also counts how often each rank of each head is right: the tree is made of that."""
        num_heads, num_ranks = self._settings.num_heads, self._settings.num_ranks
        right, seen = torch.zeros(num_heads, num_ranks), torch.zeros(num_heads, 1)

        def counted() -> Iterable[TrainBatch]:
            for batch in batches:
                for k in range(num_heads):
                    hidden, targets, _ = self._examples(batch, k, batch.future(1)[1])
                    wanted_places = self.vocab.places(targets)
                    # some rows at a time: they are as wide as the vocabulary
                    for rows, wanted in zip(hidden.split(256), wanted_places.split(256), strict=True):
                        head = self._head(k)
                        logits = F.linear(self._transform(rows, k).to(head.dtype), head)
                        best = logits.topk(num_ranks, dim=1).indices
                        right[k] += (best == wanted[:, None]).sum(dim=0).cpu()
                        seen[k] += len(wanted)
                yield batch

        metrics = super().measure(counted())
        self._accuracies = (right / seen.clamp(min=1)).tolist()
        return metrics

    def served(self) -> dict[str, torch.Tensor]:
        """See TrainableDraft."""
        of = {"weight": self.weight, "bias": self.bias, "output": self.output}
        return {f"heads.{k}.{n}": w[k] for k in range(self._settings.num_heads) for n, w in of.items()}

    def save(self, directory: Path) -> None:
        """The tree is saved as paths of ranks: `[0, 1]` is head 2's second guess behind head 1's first."""
        num_heads, dtype = self._settings.num_heads, self._run.save_dtype or self._trunk.dtype
        weights = {name: weight.to(dtype) for name, weight in self.served().items()}
        settings = {
            "num_heads": num_heads,
            "own_heads": self._settings.own_heads,
            "accuracies": self._accuracies,
            "tree": static_tree(self._accuracies, self._settings.num_nodes),
        }
        write_draft(directory, section(self._trunk, self._run, num_heads), settings, weights, self.vocab)

    def _examples(
        self, batch: TrainBatch, k: int, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of some rows the hidden states, the token that head k should guess, and the state that says it."""
        last = self._trunk.config.num_layers
        targets, valid = batch.future(k + 1)
        valid = valid & rows
        return unit_rms(batch.hidden[last][valid]), targets[valid], batch.ahead(last, k + 1)[valid]

    def _transform(self, hidden: torch.Tensor, k: int) -> torch.Tensor:
        """What head k hands to its output head: [rows, hidden] of unit rms -> the same."""
        hidden = hidden.to(self.weight.dtype)
        hidden = hidden + F.silu(F.linear(hidden, self.weight[k], self.bias[k]))
        return hidden if self._settings.own_heads else F.linear(hidden, self.output[k])

    def _head(self, k: int) -> torch.Tensor:
        return self.output[k] if self._settings.own_heads else self._shared


def static_tree(accuracies: list[list[float]], num_nodes: int) -> list[list[int]]:
    """The nodes with the largest chance of acceptance, if heads err independently; the best first.

    Args:
        accuracies: For each head how often its best, second, … guess is right.
        num_nodes: How many nodes.

    Returns:
        For each node the ranks on the path to it.
    """
    # a later rank never counts more than an earlier one, or a node could come before its elder sibling
    falling = [list(accumulate(of_head, min)) for of_head in accuracies]

    def children(path: tuple[int, ...]) -> Iterable[tuple[int, float, tuple[int, ...]]]:
        for rank, chance in enumerate(falling[len(path)]):
            yield rank, chance, (*path, rank)

    root: tuple[int, ...] = ()
    tree = grow(root, children, num_nodes, len(falling), min_prob=1e-6)
    return [list(path) for path in tree.paths()]


def create(trunk: Trunk, run: Run, settings: Settings) -> Medusa:
    """Builds untrained heads."""
    return Medusa(trunk, run, settings)
