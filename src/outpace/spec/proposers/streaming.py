"""Drafts by streams of the target itself, in the pass that verifies the draft before.

Bhendawade et al., "Speculative Streaming: Fast LLM Inference without Auxiliary Models", 2024. Before the
last layers a row that may end the accepted path gets γ more rows, its streams, of which the j-th predicts
the token j places after the row's own prediction. Those of the row where the path did end make the next
draft: every token of depth j + 1 may follow every token of depth j, and of that tree the most probable nodes
are kept. Streams that were trained with `token_rank` say how probable a token is behind each of those.

Which rows get streams is a question of price. A row's chance of ending the path, times what a draft wins,
is set against what its streams cost at the going rate of tokens (the paper has a constant threshold). The
chance is what the draft said, or, where the rows in question cost more than a stop in the middle of the pass,
what the early exit says there. A row that ends the path without streams costs a step without a draft. The
output head runs on the streams of that one row, in the next step, and only if that step may draft.
"""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from outpace.batch import Batch, BatchEntry, TargetOutput, Verdict
from outpace.device import Download, indices, tensor_of, upload
from outpace.kernels import EarlyExit
from outpace.models.config import ModelConfig
from outpace.models.decoder import Decoder
from outpace.models.draft_checkpoint import Shapes, read_draft
from outpace.models.draft_vocab import DraftVocab
from outpace.models.streams import StreamConfig, Streams
from outpace.request import Sequence
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.streams import Anchors, StreamPass, reserve
from outpace.sampling import SampleRow
from outpace.spec.drafter import best_places
from outpace.spec.proposer import DraftContext, Prices, Proposer
from outpace.tree import EMPTY_TREE, DraftTree, grow

KEYS: dict[str, type] = {  # settings of a checkpoint
    field.name: list if field.name == "lora_targets" else int for field in fields(StreamConfig)
}
_KEPT = 0.98  # weight of what was seen before in what a draft wins: about the last fifty drafts count
_LEAST_VALUE = 1e-3  # accepted tokens that a draft is taken to win, however bad it was
_MOST_PRICES = 16  # about so many are asked for in a step, each some microseconds with cold caches
_CONSIDERED = 16  # tokens of a stream, of which the best behind each one before are looked for
_STOP = 0.03  # of a step's tokens that asking the early exit costs: the pass has to stop for it
_UNKNOWN = 0.5  # acceptance of a draft about which its method says nothing


@dataclass(frozen=True, slots=True)
class _Candidates:
    """What a sequence may go on with.

    Attributes:
        token_ids: By depth the tokens that are considered.
        places: By depth and place of the token before it where the likeliest tokens are among those.
        chances: How likely they are there.
    """

    token_ids: list[list[int]]
    places: list[list[list[int]]]
    chances: list[list[list[float]]]


class Streaming(Proposer):
    """Keeps the streams of each sequence's last row until its next step.

    Attributes:
        value: Accepted tokens per draft, of late.
    """

    def __init__(
        self,
        streams: Streams,
        vocab: DraftVocab,
        decoder: Decoder,
        kv: KVCache,
        branching: int,
        min_prob: float | None,
    ) -> None:
        """Joins the parts.

        Args:
            streams: Weights for that decoder.
            vocab: The tokens that they draft.
            decoder: The target.
            kv: Its cache.
            branching: Most tokens drafted from a stream.
            min_prob: Least probability of ending the path for a row to get streams; None leaves it to the
                policy's price.
        """
        self.value = 1.0
        self._streams, self._decoder, self._blocks = streams, decoder, kv.blocks
        self._vocab, self._head = vocab, decoder.head(vocab)
        self._branching, self._min_prob = branching, min_prob
        self._wanted: set[str] = set()  # sequences that may draft in the present step
        # What streams said at each sequence's last row: where that is in [rows, streams, hidden].
        self._said: dict[str, tuple[torch.Tensor, int]] = {}

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """See Proposer. Streams of this step are for those with a limit: they are asked to draft."""
        self._wanted = {s.id for s, limit in zip(sequences, limits, strict=True) if limit}
        drafting = [s for s in sequences if s.id in self._wanted and s.id in self._said]
        if not drafting:
            return [EMPTY_TREE] * len(sequences)
        found = self._candidates(drafting)
        return [
            _tree(found[s.id], limit) if limit and s.id in found else EMPTY_TREE
            for s, limit in zip(sequences, limits, strict=True)
        ]

    def streams(self, batch: Batch, prices: Prices) -> StreamPass | None:
        """See Proposer."""
        wanted, self._wanted = self._wanted, set()
        anchors = [self._anchors(entry) if entry.sequence.id in wanted else [] for entry in batch.entries]
        if not any(anchors):
            return None
        several = [entry for entry, nodes in zip(batch.entries, anchors, strict=True) if len(nodes) > 1]
        expected = [q for entry in several for q in entry.tree.confidence or [_UNKNOWN] * len(entry.tree)]
        chosen, cost = self._choose(batch, anchors, prices, expected)
        early_exit = self._streams.early_exit
        is_dear = self._min_prob is not None or cost > _STOP * (1 + self.value) * len(several)
        if early_exit is None or not several or not is_dear:
            return StreamPass(self._streams, chosen)

        def choose(normed: torch.Tensor) -> Anchors:
            acceptance = self._acceptance(early_exit, several, expected, normed)
            return self._choose(batch, anchors, prices, acceptance)[0]

        return StreamPass(self._streams, anchors, choose)

    def observe(self, batch: Batch, target: TargetOutput, verdict: Verdict) -> None:
        """Keeps the streams of the rows where paths ended."""
        said = target.streams
        for index, (entry, decision) in enumerate(zip(batch.entries, verdict.decisions, strict=True)):
            if decision is None:
                continue
            if len(entry.tree):
                self.value += (1 - _KEPT) * (len(decision.path) - self.value)
            place = said.places.get((index, decision.path[-1] if decision.path else -1)) if said else None
            if said is None or place is None:
                self._said.pop(entry.sequence.id, None)
            else:
                self._said[entry.sequence.id] = said.hidden, place

    def release(self, sequence_id: str) -> None:
        """See Proposer."""
        self._wanted.discard(sequence_id)
        self._said.pop(sequence_id, None)

    @torch.inference_mode()
    def _candidates(self, sequences: list[Sequence]) -> dict[str, _Candidates]:
        """For each sequence what may come."""
        kernels, depth, change = self._decoder.kernels, self._streams.config.num_streams, self._streams.change
        hidden, anchors = self._all_said(sequences)
        last = indices([s.token_ids[-1] for s in sequences], hidden.device)
        is_plain = all(p.is_greedy and not p.adjusts for p in (s.request.sampling for s in sequences))
        if change is not None and is_plain:
            number = min(max(self._branching, _CONSIDERED), len(self._vocab))
            most = min(self._branching, number)
            places, index, chances = kernels.stream_candidates(
                change, self._head, hidden, anchors, self._decoder.embedding, last, number, most
            )
            return self._named(sequences, self._vocab, places, index, chances)
        said = hidden.index_select(0, anchors)  # [sequences, streams, hidden]
        units = None if change is None else kernels.change_first_(change, said, self._decoder.embed(last))
        # A stream does not know which tokens come before its own; the last known one stands for them.
        rows = [SampleRow(s, (s.token_ids[-1],) * place) for s in sequences for place in range(depth)]
        number = self._branching if change is None else max(self._branching, _CONSIDERED)
        *found, vocab = best_places(self._head(said.flatten(0, 1)), rows, number, kernels, self._vocab)
        places, probs = (of.view(-1, depth, of.shape[1]) for of in found)  # [sequences, streams, tokens]
        most = min(self._branching, probs.shape[2])
        if change is not None and units is not None:
            temperature, probs = self._drawn(sequences, probs)
            own = places if vocab is self._vocab else self._vocab.places(vocab.ids(places))
            index, chances = kernels.likeliest_behind(change, units, own, probs, temperature, most)
        else:  # the same behind each token before
            chances, index = probs.unsqueeze(2).expand(-1, -1, probs.shape[2], -1).topk(most)
        return self._named(sequences, vocab, places, index, chances)

    def _all_said(self, sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """What streams said, [rows, streams, hidden], and which row is each sequence's, [sequences] int64."""
        hidden, places = zip(*(self._said[s.id] for s in sequences), strict=True)
        if all(of is hidden[0] for of in hidden):  # they were in the same steps
            return hidden[0], indices(places, hidden[0].device)
        stacked = torch.stack([of[place] for of, place in zip(hidden, places, strict=True)])
        return stacked, indices(range(len(stacked)), stacked.device)

    @staticmethod
    def _named(sequences: list[Sequence], vocab: DraftVocab, *found: torch.Tensor) -> dict[str, _Candidates]:
        """For each sequence the fields of `_Candidates`, where tokens are still places in a vocabulary."""
        each = zip(*(of.tolist() for of in [Download(of) for of in found]), strict=True)
        return {
            s.id: _Candidates([vocab.names(of_depth) for of_depth in places], index, chances)
            for s, (places, index, chances) in zip(sequences, each, strict=True)
        }

    def _drawn(self, sequences: list[Sequence], probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The temperatures, [sequences], and of candidates' probabilities those that noise leaves a chance.

        Args:
            sequences: Whose candidates they are.
            probs: [sequences, streams, tokens].
        """
        params = [s.request.sampling for s in sequences]
        temperature = tensor_of([1.0 if p.is_greedy else p.temperature for p in params], np.float32)
        if all(p.is_greedy for p in params):
            return upload([temperature], probs.device)[0], probs
        # Noise goes to tokens beyond these that what came before does not make up for.
        number = tensor_of([probs.shape[2] if p.is_greedy else self._branching for p in params])
        temperature, number = upload([temperature, number], probs.device)
        place = torch.arange(probs.shape[2], device=probs.device)
        return temperature, probs.where(place < number.view(-1, 1, 1), 0.0)

    def _anchors(self, entry: BatchEntry) -> list[int]:
        """Rows of an entry whose streams could make a draft, as far as there is room in the cache."""
        sequence, request = entry.sequence, entry.sequence.request
        num_streams = self._streams.config.num_streams
        positions = self._decoder.config.max_position_embeddings
        left = request.max_tokens - sequence.num_output - 1  # after the token that follows the last known one
        nodes = [
            node
            for node, depth in zip((-1, *range(len(entry.tree))), (0, *entry.tree.depths()), strict=True)
            if left - depth > 1 and len(sequence.token_ids) + depth + num_streams <= positions
        ]
        return reserve(self._blocks, entry, nodes, num_streams)

    def _choose(
        self, batch: Batch, anchors: Anchors, prices: Prices, acceptance: list[float]
    ) -> tuple[Anchors, float]:
        """Drops rows whose streams are not worth their time; each sequence keeps its likeliest.

        Args:
            batch: The step.
            anchors: Rows that have room for streams.
            prices: What rows cost.
            acceptance: For each node of the trees of entries that have several of these the probability that
                it is accepted if its parent is.

        Returns:
            The rows that are left, and what those beyond the likeliest cost, in tokens.
        """
        kept: Anchors = [[] for _ in anchors]
        others: list[tuple[float, int, int]] = []  # chance of ending the path, entry, node
        left = iter(acceptance)
        for index, (entry, nodes) in enumerate(zip(batch.entries, anchors, strict=True)):
            ends = _ends(entry.tree, left) if len(nodes) > 1 else [1.0]
            best = max(nodes, key=lambda node: ends[node + 1], default=None)
            kept[index] += [node for node in nodes if node == best]
            others += [(ends[node + 1], index, node) for node in nodes if node != best]
        others.sort(reverse=True)
        num_first = sum(map(len, kept))
        num, cost = self._num_worthwhile([chance for chance, *_ in others], num_first, batch, prices)
        for _, index, node in others[:num]:
            kept[index].append(node)
        return [sorted(nodes) for nodes in kept], cost

    def _num_worthwhile(
        self, chances: list[float], num_first: int, batch: Batch, prices: Prices
    ) -> tuple[int, float]:
        """How many more rows should have streams, and what these cost, in tokens.

        Args:
            chances: That paths end at them, falling.
            num_first: Rows that have streams anyway.
            batch: The step.
            prices: What rows cost.
        """
        if self._min_prob is not None:
            return bisect_right(chances, -self._min_prob, key=operator.neg), 0.0
        config = self._streams.config
        share = config.num_stream_layers / self._decoder.config.num_layers

        value = max(self.value, _LEAST_VALUE)
        won = list(itertools.accumulate((value * chance for chance in chances), initial=0.0))
        places = range(0, len(won), 1 + len(won) // _MOST_PRICES)
        # The last layers have these rows more: where kernels have stairs, that is not what as many rows cost
        # that are spread over all layers.
        costs = prices(batch.num_rows, [(num_first + num) * config.num_streams for num in places])
        _, num, cost = max(
            (won[num] - share * cost, num, cost) for num, cost in zip(places, costs, strict=True)
        )
        return num, share * (cost - costs[0])

    def _acceptance(
        self, early_exit: EarlyExit, entries: list[BatchEntry], expected: list[float], normed: torch.Tensor
    ) -> list[float]:
        """For the nodes of all their trees the probability that each is accepted if its parent is.

        Args:
            early_exit: Who says so.
            entries: Whose trees.
            expected: What drafts themselves said.
            normed: [rows, hidden], states where streams begin, after the final norm.
        """
        parents = [e.first_row + e.num_known + parent for e in entries for parent in e.tree.parents]
        token_ids = [token_id for entry in entries for token_id in entry.tree.token_ids]
        of_tokens = [tensor_of(parents), tensor_of(token_ids), tensor_of(expected, np.float32)]
        probs = self._decoder.kernels.exit_probs(early_exit, normed, *upload(of_tokens, normed.device))
        chances: list[float] = probs.tolist()
        return chances


def _ends(tree: DraftTree, acceptance: Iterator[float]) -> list[float]:
    """The probabilities that the accepted path ends at the root, at the first node, and so on.

    Args:
        tree: What is verified.
        acceptance: For its nodes the probability that each is accepted if its parent is, and what follows.
    """
    reached, goes_on = [1.0], [0.0] * (len(tree) + 1)
    for parent, prob in zip(tree.parents, acceptance, strict=False):
        reached.append(reached[parent + 1] * prob)
        goes_on[parent + 1] += prob
    return [r * max(0.0, 1.0 - g) for r, g in zip(reached, goes_on, strict=True)]


def _tree(found: _Candidates, limit: int) -> DraftTree:
    """The most probable nodes of the tree in which every token of a depth may follow every one before."""

    def children(node: tuple[int, int]) -> Iterator[tuple[int, float, tuple[int, int]]]:
        depth, before = node
        of_depth = found.token_ids[depth]
        for place, chance in zip(found.places[depth][before], found.chances[depth][before], strict=True):
            if chance:
                yield of_depth[place], chance, (depth + 1, place)

    return grow((0, 0), children, limit, len(found.token_ids))


def stream_config(settings: dict[str, Any]) -> StreamConfig:
    """The shape of streams from a checkpoint's settings, which has all of `KEYS`.

    Raises:
        ConfigError: One is not in range.
    """
    return StreamConfig(
        **{key: settings[key] for key in KEYS} | {"lora_targets": (*settings["lora_targets"],)}
    )


def create(context: DraftContext) -> Streaming:
    """Loads the checkpoint that `model` names.

    Raises:
        ConfigError: It cannot be had, or was trained for another target.
    """
    settings, decoder = context.speculative, context.decoder
    model: ModelConfig = decoder.config

    def shapes(raw: dict[str, Any], _: int) -> Shapes:
        return stream_config(raw).weight_shapes(model)

    checkpoint = read_draft(settings.model, "streaming", model, shapes, decoder.dtype, KEYS, decoder.device)
    config = stream_config(checkpoint.settings)
    streams = Streams(config, checkpoint.weights, decoder, checkpoint.vocab)
    branching = settings.draft_branching or config.branching
    return Streaming(streams, checkpoint.vocab, decoder, context.kv, branching, settings.stream_min_prob)
