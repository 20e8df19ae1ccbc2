"""Drafts by Medusa heads on the target's last hidden state (Cai et al., "Medusa", 2024).

Head k guesses the token k after the next one from the state that gave the next one, so a draft costs the
heads and no pass of a model: one product with the output head for all sequences and depths. `outpace train
medusa` makes the heads and measures the tree.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from outpace.batch import Batch, TargetOutput, Verdict
from outpace.errors import ConfigError
from outpace.kernels import Kernels, Linear
from outpace.models.config import ModelConfig
from outpace.models.draft_checkpoint import Shapes, read_draft
from outpace.models.draft_vocab import DraftVocab
from outpace.request import Sequence
from outpace.sampling import SampleRow
from outpace.spec.drafter import likely_tokens
from outpace.spec.last_hidden import LastHidden
from outpace.spec.proposer import DraftContext, Proposer
from outpace.tree import EMPTY_TREE, DraftTree


class _Place(NamedTuple):
    """A node of the static tree: the `rank`-th guess of head `depth`, behind node `parent`."""

    parent: int
    depth: int
    rank: int


class Medusa(Proposer):
    """Drafts by heads; see the module's text."""

    def __init__(
        self,
        blocks: list[Linear],
        outputs: list[Linear],
        shared: Linear | None,
        vocab: DraftVocab,
        tree: list[list[int]],
        kernels: Kernels,
    ) -> None:
        """Joins the parts: head k is `shared(output(h + SiLU(block(h))))`.

        Args:
            blocks: By depth.
            outputs: By depth.
            shared: The output head of all; None where `outputs` are output heads.
            vocab: The tokens that output heads are over.
            tree: For each node the ranks on its path, best first.
            kernels: Who chooses.

        Raises:
            ConfigError: The tree is none.
        """
        self._blocks, self._outputs, self._shared = blocks, outputs, shared
        self._vocab, self._kernels = vocab, kernels
        self._places = _places(tree, len(blocks))
        self._hidden = LastHidden()

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """See Proposer."""
        wanted = self._hidden.known(sequences, limits)
        if not wanted or not self._places:
            return [EMPTY_TREE] * len(sequences)
        places = self._places[: max(limit for _, limit in wanted)]
        found = self._candidates([s for s, _ in wanted], places)
        trees = {
            s.id: _tree(places[:limit], of_one) for (s, limit), of_one in zip(wanted, found, strict=True)
        }
        return [trees.get(s.id, EMPTY_TREE) for s in sequences]

    def observe(self, batch: Batch, target: TargetOutput, verdict: Verdict) -> None:
        """See Proposer."""
        self._hidden.observe(batch, target, verdict)

    def release(self, sequence_id: str) -> None:
        """See Proposer."""
        self._hidden.release(sequence_id)

    @torch.inference_mode()  # not for a step without drafts: entering it takes 0.1 ms behind a pass
    def _candidates(
        self, sequences: list[Sequence], places: list[_Place]
    ) -> list[list[list[tuple[int, float]]]]:
        """For each sequence and head the tokens it guesses, the likeliest first, with their probabilities."""
        depth = 1 + max(place.depth for place in places)
        hidden = self._hidden.stack(sequences)  # [sequences, hidden]
        heads = zip(self._blocks[:depth], self._outputs[:depth], strict=True)
        out = torch.cat([output(hidden + F.silu(block(hidden))) for block, output in heads])
        logits = out if self._shared is None else self._shared(out)  # [depth * sequences, tokens]
        # What will stand between is not known; it matters only to penalties, and a draft may err.
        rows = [SampleRow(s, (s.token_ids[-1],) * d) for d in range(depth) for s in sequences]
        ranks = 1 + max(place.rank for place in places)
        found = likely_tokens(logits, rows, ranks, self._kernels, self._vocab)
        return [found[i :: len(sequences)] for i in range(len(sequences))]


def _tree(places: list[_Place], found: list[list[tuple[int, float]]]) -> DraftTree:
    """The static tree with the tokens that one sequence's heads guess, the likeliest node first."""
    kept: dict[int, int] = {-1: -1}  # node of the static tree -> node of this one
    parents: list[int] = []
    token_ids: list[int] = []
    confidence: list[float] = []
    for node, (parent, depth, rank) in enumerate(places):
        if parent in kept and rank < len(found[depth]):  # a request's filters may leave fewer tokens
            kept[node] = len(parents)
            parents.append(kept[parent])
            token_ids.append(found[depth][rank][0])
            confidence.append(found[depth][rank][1])
    return DraftTree(tuple(parents), tuple(token_ids), tuple(confidence)).best_first()


def _places(tree: list[list[int]], num_heads: int) -> list[_Place]:
    """The nodes of a tree that is given by paths of ranks.

    Raises:
        ConfigError: A node comes before its parent, or is deeper than there are heads.
    """
    numbers: dict[tuple[int, ...], int] = {(): -1}
    places: list[_Place] = []
    for path in map(tuple, tree):
        if not 0 < len(path) <= num_heads or path[:-1] not in numbers or path in numbers:
            raise ConfigError(
                f"medusa: node {list(path)} of the tree in config.json must come once, after its parent, "
                f"and be no deeper than the {num_heads} heads"
            )
        numbers[path] = len(places)
        places.append(_Place(numbers[path[:-1]], len(path) - 1, path[-1]))
    return places


def _shapes(settings: dict[str, Any], vocab_size: int, target: ModelConfig) -> Shapes:
    width, shapes = target.hidden_size, Shapes()
    for k in range(settings["num_heads"]):
        shapes[f"heads.{k}.weight"], shapes[f"heads.{k}.bias"] = (width, width), (width,)
        shapes[f"heads.{k}.output"] = (vocab_size if settings["own_heads"] else width, width)
    return shapes


def create(context: DraftContext) -> Medusa:
    """Loads the heads that `model` names.

    Raises:
        ConfigError: They cannot be had, or are not for this target.
    """
    target = context.decoder
    draft = read_draft(
        context.speculative.model,
        "medusa",
        target.config,
        lambda settings, vocab_size: _shapes(settings, vocab_size, target.config),
        target.dtype,
        keys={"num_heads": int, "own_heads": bool, "tree": list},
        device=target.device,
    )
    kernels, weights = target.kernels, draft.weights
    heads = range(draft.settings["num_heads"])
    blocks = [kernels.linear(weights[f"heads.{k}.weight"], weights[f"heads.{k}.bias"]) for k in heads]
    outputs = [kernels.linear(weights[f"heads.{k}.output"]) for k in heads]
    shared = None if draft.settings["own_heads"] else target.head(draft.vocab)
    return Medusa(blocks, outputs, shared, draft.vocab, draft.settings["tree"], kernels)
