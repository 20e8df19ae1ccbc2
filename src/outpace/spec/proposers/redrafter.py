"""Drafts by a recurrent head with beam search (Cheng et al., "Recurrent Drafter", 2024).

`outpace train redrafter` makes the weights and states the equations. The beams of a sequence share their
beginnings, so what is verified is the tree of all beams that were kept at some depth, each node once: the
paper's packed beams. The width follows from what the policy allows: many nodes for a lone user are wide
beams, a few under load are a chain.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from outpace.batch import Batch, TargetOutput, Verdict
from outpace.device import indices
from outpace.kernels import Linear
from outpace.models.config import ModelConfig
from outpace.models.decoder import Decoder
from outpace.models.draft_checkpoint import Shapes, read_draft
from outpace.models.draft_vocab import DraftVocab
from outpace.request import Sequence
from outpace.sampling import SampleRow
from outpace.spec.drafter import likely_tokens
from outpace.spec.last_hidden import LastHidden, unit_rms
from outpace.spec.proposer import DraftContext, Proposer
from outpace.tree import EMPTY_TREE, DraftTree


class _Beam(NamedTuple):
    """A path of drafted tokens, the last of which is a node of the tree.

    Attributes:
        node: Its number, or -1 at the root.
        row: Where its state is in the pass before.
        tokens: The path.
        score: The probability of the path.
    """

    node: int
    row: int
    tokens: tuple[int, ...]
    score: float


@dataclass(slots=True)
class _Search:
    """The beams of one sequence, and the tree of all that were kept."""

    sequence: Sequence
    limit: int
    width: int
    beams: list[_Beam]
    parents: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def extend(self, found: list[list[tuple[int, float]]], first_row: int) -> None:
        """Keeps the `width` best continuations.

        Args:
            found: For each beam tokens and their probabilities.
            first_row: Where the beams' states begin in this pass.
        """
        every = [
            (beam.score * prob, place, token_id, prob)
            for place, (beam, tokens) in enumerate(zip(self.beams, found, strict=True))
            for token_id, prob in tokens
        ]
        every.sort(key=lambda candidate: -candidate[0])
        beams = []
        for score, place, token_id, prob in every[: self.width]:
            beam = self.beams[place]
            beams.append(_Beam(len(self.parents), first_row + place, (*beam.tokens, token_id), score))
            self.parents.append(beam.node)
            self.token_ids.append(token_id)
            self.confidence.append(prob)
            self.scores.append(score)
        self.beams = beams

    def has_room(self) -> bool:
        """Whether a continuation of the best beam could be among the `limit` best nodes."""
        return sum(score >= self.beams[0].score for score in self.scores) < self.limit

    def tree(self) -> DraftTree:
        """The best nodes."""
        tree = DraftTree(tuple(self.parents), tuple(self.token_ids), tuple(self.confidence))
        return tree.best_first().cut(self.limit)


@dataclass(frozen=True)
class Recurrence:
    """The trained layers; names as in `training/methods/redrafter.py`."""

    token: Linear
    state: Linear
    blocks: tuple[Linear, ...]
    output: Linear


class ReDrafter(Proposer):
    """Searches for all sequences side by side, one pass of the recurrence per depth."""

    def __init__(self, target: Decoder, layers: Recurrence, vocab: DraftVocab, num_tokens: int) -> None:
        """Joins the parts.

        Args:
            target: Lends its embedding and its output head.
            layers: What was trained.
            vocab: The tokens that are drafted.
            num_tokens: Greatest depth.
        """
        self._target, self._layers, self._num_tokens = target, layers, num_tokens
        self._vocab, self._head = vocab, target.head(vocab)
        self._hidden = LastHidden()

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """See Proposer."""
        wanted = self._hidden.known(sequences, limits)
        found = self._search(wanted) if wanted else {}
        return [found.get(s.id, EMPTY_TREE) for s in sequences]

    @torch.inference_mode()  # not for a step without drafts: entering it takes 0.1 ms behind a pass
    def _search(self, wanted: list[tuple[Sequence, int]]) -> dict[str, DraftTree]:
        """The trees of some sequences by id, each with its limit."""
        searches = {
            s.id: _Search(s, limit, min(limit, 1 + limit // self._num_tokens), [_Beam(-1, i, (), 1.0)])
            for i, (s, limit) in enumerate(wanted)
        }
        hidden = self._hidden.stack([s for s, _ in wanted])  # [sequences, hidden]
        places = {s.id: i for i, (s, _) in enumerate(wanted)}
        states = torch.zeros_like(hidden)
        active = list(searches.values())
        for _ in range(self._num_tokens):
            began = indices([places[s.sequence.id] for s in active for _ in s.beams], hidden.device)
            states = self._extend(active, hidden[began], states)
            active = [search for search in active if search.has_room()]
            if not active:
                break
        return {name: search.tree() for name, search in searches.items()}

    def observe(self, batch: Batch, target: TargetOutput, verdict: Verdict) -> None:
        """See Proposer."""
        self._hidden.observe(batch, target, verdict)

    def release(self, sequence_id: str) -> None:
        """See Proposer."""
        self._hidden.release(sequence_id)

    def _extend(self, searches: list[_Search], hidden: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Takes a token more into each beam and extends the searches; returns the beams' new states.

        Args:
            searches: Those that go on.
            hidden: [beams, hidden], the target's state that each beam's draft begins from.
            states: [beams of the depth before, hidden].
        """
        layers, beams = self._layers, [(s.sequence, beam) for s in searches for beam in s.beams]
        last = [beam.tokens[-1] if beam.tokens else sequence.token_ids[-1] for sequence, beam in beams]
        before = states[indices([beam.row for _, beam in beams], states.device)]
        taken_in = unit_rms(self._target.embed(indices(last, states.device)))
        states = F.silu(layers.token(taken_in) + layers.state(before))  # [beams, hidden]
        x = torch.cat((hidden, states), dim=1)
        for block in layers.blocks:
            x = x + F.silu(block(x))
        logits = self._head(layers.output(x))
        rows = [SampleRow(sequence, beam.tokens) for sequence, beam in beams]
        widest = max(search.width for search in searches)
        found = likely_tokens(logits, rows, widest, self._target.kernels, self._vocab)
        first_row = 0
        for search in searches:
            end = first_row + len(search.beams)
            search.extend(found[first_row:end], first_row)
            first_row = end
        return states


def _shapes(settings: dict[str, Any], target: ModelConfig) -> Shapes:
    width = target.hidden_size
    shapes: Shapes = {"token.weight": (width, width), "output.weight": (width, 2 * width)}
    shapes |= {"state.weight": (width, width), "state.bias": (width,)}
    for i in range(settings["num_blocks"]):
        shapes |= {f"blocks.{i}.weight": (2 * width, 2 * width), f"blocks.{i}.bias": (2 * width,)}
    return shapes


def create(context: DraftContext) -> ReDrafter:
    """Loads the drafter that `model` names.

    Raises:
        ConfigError: It cannot be had, or is not for this target.
    """
    target = context.decoder
    draft = read_draft(
        context.speculative.model,
        "redrafter",
        target.config,
        lambda settings, _: _shapes(settings, target.config),
        target.dtype,
        keys={"num_tokens": int, "num_blocks": int},
        device=target.device,
    )

    def linear(name: str) -> Linear:
        return target.kernels.linear(draft.weights[f"{name}.weight"], draft.weights.get(f"{name}.bias"))

    blocks = tuple(linear(f"blocks.{i}") for i in range(draft.settings["num_blocks"]))
    layers = Recurrence(linear("token"), linear("state"), blocks, linear("output"))
    return ReDrafter(target, layers, draft.vocab, draft.settings["num_tokens"])
