"""The operations a decoder is made of.

Three implementations: native.py for CPUs, gpu/ for GPUs and, slow and obvious, reference.py.

All of them promise that a row's result depends on that row alone, bit for bit: not on how many rows share
the call, nor on their order (design: the output never depends on the batch). Only linear layers on a GPU
break it, unless they are asked not to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from outpace.config import BLOCK_SIZE
from outpace.device import tensor_of, upload
from outpace.kernels.stream_heads import EarlyExit, TokenChange, exit_logits, unit

Linear = Callable[[torch.Tensor], torch.Tensor]
Cache = Sequence[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Cosines and sines by position.

    Attributes:
        cos_sin: [max_position, head_dim] float32: head_dim / 2 cosines, then as many sines.
    """

    cos_sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class Heads:
    """How a qkv row is divided: query heads, then key heads, then value heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the rows of one forward pass stand, as attention sees them.

    Attributes:
        positions: [rows] int32.
        slots: [rows] int32, the physical cache slot: block id * block size + offset.
        parents: [rows] int32, the row before this one on its path, counted from the sequence's first row;
            -1 at the first.
        row_starts: [sequences + 1] int32, where each sequence's rows begin.
        context_lens: [sequences] int32, tokens in the cache before this pass.
        block_tables: [sequences, max_blocks] int32, zero-padded.
        branching: [sequences] int32, 1 where a sequence's rows are not simply one after the other.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    parents: torch.Tensor
    row_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    branching: torch.Tensor


class LayerAttention(ABC):
    """Attention of one forward pass: built once per pass, called once per layer."""

    @abstractmethod
    def __call__(
        self,
        qkv: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        window: int | None,
    ) -> torch.Tensor:
        """Norms and rotates q and k, writes k and v to the cache, attends.

        Row r of a sequence attends to the cached context, to the rows on its path (itself included), and
        where `window` is given only to the latest `window` positions of those.

        Args:
            qkv: [rows, (num_heads + 2 * num_kv_heads) * head_dim]; overwritten.
            k_cache: A layer's, as `new_cache` has it for these kernels; written at the pass's slots.
            v_cache: Likewise.
            q_norm: [head_dim] weight of the RMS norm of q heads, or None.
            k_norm: The same for k heads.
            window: Sliding window in positions, or None.

        Returns:
            [rows, num_heads * head_dim].
        """


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one decoder layer, packed."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    window: int | None


class LayerStack:
    """Layers, one after the other, over their caches."""

    def __init__(
        self, kernels: Kernels, layers: Sequence[Layer], cache: Cache, last_norm: torch.Tensor, eps: float
    ) -> None:
        """Joins what `Kernels.stack` is given."""
        self._kernels, self._cache, self._last_norm, self._eps = kernels, cache, last_norm, eps
        self.layers = (*layers,)

    def __len__(self) -> int:
        return len(self.layers)

    def run(
        self, attend: LayerAttention, residual: torch.Tensor, first: int = 0, end: int | None = None
    ) -> torch.Tensor:
        """Runs some of the layers, at least one.

        Args:
            attend: Of this pass.
            residual: [rows, hidden], the residual stream before them, and after the call behind them.
            first: The first of them.
            end: That after the last of them; None runs all that follow.

        Returns:
            [rows, hidden], the norm of the residual stream behind them, with the weight of the last norm.
        """
        kernels, eps, layers = self._kernels, self._eps, self.layers[first:end]
        x = kernels.rms_norm(residual, layers[0].input_norm, eps)
        next_norms = [*(layer.input_norm for layer in layers[1:]), self._last_norm]
        for layer, next_norm, keys_and_values in zip(layers, next_norms, self._cache[first:], strict=False):
            mixed = attend(layer.qkv(x), *keys_and_values, layer.q_norm, layer.k_norm, layer.window)
            x = kernels.add_rms_norm(layer.out(mixed), residual, layer.post_norm, eps)
            change = layer.down(kernels.silu_mul(layer.gate_up(x)))
            x = kernels.add_rms_norm(change, residual, next_norm, eps)
        return x

    def ending_in(self, layers: Sequence[Layer]) -> LayerStack:
        """The stack with its last layers replaced by these."""
        kept = self.layers[: len(self) - len(layers)]
        return type(self)(self._kernels, (*kept, *layers), self._cache, self._last_norm, self._eps)


Moves = Sequence[tuple[int, int]]  # slots of a cache (from, to)


def move_slots(keys: torch.Tensor, values: torch.Tensor, moves: Moves) -> None:
    """Copies keys and values of slots, over all layers.

    Args:
        keys: [layers, ...], as `new_cache` has them; overwritten.
        values: Likewise.
        moves: All are read before one is written.
    """
    source, target = upload(tensor_of(moves).unbind(1), keys.device)
    (block, at), (to_block, to) = ((of // BLOCK_SIZE, of % BLOCK_SIZE) for of in (source, target))
    keys[:, to_block, :, :, to] = keys[:, block, :, :, at]
    group = values.shape[-1]
    values[:, to_block, :, to // group, :, to % group] = values[:, block, :, at // group, :, at % group]


class Kernels(ABC):
    """One backend.

    Attributes:
        name: As `--kernels` has it.
        build: What it was built from, for whom its speed matters.
        tile_rows: How many rows share a tile of its linear layers at most: one more row makes one more tile,
            and takes longer than the rows after it. 1 where nothing is known of tiles.
        cache_group: Dims of a cache's keys that lie side by side, and positions of its values: as many as one
            instruction multiplies and sums.
    """

    name: str
    build: str
    tile_rows: int = 1
    cache_group: int = 1

    @abstractmethod
    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """Packs `weight` [out, in] and gives x [rows, in] -> [rows, out]; x is contiguous."""

    @abstractmethod
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """`weight * x / rms(x)` for each row of x [rows, width]."""

    @abstractmethod
    def add_rms_norm(
        self, delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Adds `delta` to `residual` in place, then norms it; both are [rows, width]."""

    @abstractmethod
    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`: [rows, 2 * width] -> [rows, width]."""

    @abstractmethod
    def attention(self, heads: Heads, rope: RopeTable, eps: float, rows: Rows) -> LayerAttention:
        """Prepares the attention of one forward pass; `eps` is that of the q and k norms."""

    def changed(self, linear: Linear, down: Linear, up: Linear, rows: torch.Tensor) -> Linear:
        """A linear layer with a low-rank change in some rows: x -> linear(x) + up(down(x)) there.

        Args:
            linear: Of this backend, as the next two.
            down: [rows, in] -> [rows, rank], without bias.
            up: [rows, rank] -> [rows, out], without bias.
            rows: [changed] int64, each once. The others keep their bits.
        """

        def changed(x: torch.Tensor) -> torch.Tensor:
            return linear(x).index_add_(0, rows, up(down(x[rows])))

        return changed

    def stack(self, layers: Sequence[Layer], cache: Cache, last_norm: torch.Tensor, eps: float) -> LayerStack:
        """Layers that many passes run over the same cache.

        Args:
            layers: Their weights, at least one.
            cache: For each of them its keys and values, at least.
            last_norm: Weight of the norm behind the last.
            eps: Of the norms.
        """
        return LayerStack(self, layers, cache, last_norm, eps)

    def move_slots(self, keys: torch.Tensor, values: torch.Tensor, moves: Moves) -> None:
        """Copies keys and values of slots over all layers, see the function."""
        move_slots(keys, values, moves)

    @abstractmethod
    def filter_logits_(
        self, logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
    ) -> None:
        """Sets to -inf, in place, what each row's top-k, top-p and min-p remove.

        The order is top-k, then top-p on the renormalised rest, then min-p against the most probable token.
        Equal logits are ranked by token id, lower first. One token always stays.

        Args:
            logits: [rows, vocab] float32.
            top_k: [rows] int64; 0 keeps all.
            top_p: [rows] float32 in (0, 1].
            min_p: [rows] float32 in [0, 1].
        """

    @abstractmethod
    def noisy_argmax(
        self, logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, noisy: torch.Tensor
    ) -> torch.Tensor:
        """Argmax of each row, with Gumbel noise keyed by (seed, position, token id) where asked.

        Ties go to the lowest token id.

        Args:
            logits: [rows, vocab] in float32 or the model's dtype.
            seeds: [rows] int64.
            positions: [rows] int64, the index in its sequence of the token being chosen.
            noisy: [rows] bool.

        Returns:
            [rows] int64 token ids.
        """

    def noisy_topk(
        self,
        logits: torch.Tensor,
        number: int,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        noisy: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that `noisy_argmax` would choose one after the other, each without those before it.

        With noise it draws without replacement (Kool et al., "Stochastic Beams and Where to Find Them",
        2019).

        Args:
            logits: As for `noisy_argmax`.
            number: How many tokens, from 1 to the whole vocabulary.
            seeds: [rows] int64.
            positions: [rows] int64.
            noisy: [rows] bool.

        Returns:
            [rows, number] int64 token ids, and [rows, number] float32, their probabilities without noise.
            Where fewer tokens are possible, the rest has probability 0.
        """
        left, total = logits.clone(), logits.float().logsumexp(dim=1, keepdim=True)
        ids, values = [], []
        for _ in range(number):
            ids.append(self.noisy_argmax(left, seeds, positions, noisy).unsqueeze(1))
            values.append(left.gather(1, ids[-1]))
            left.scatter_(1, ids[-1], -torch.inf)
        probs = (torch.cat(values, 1).float() - total).exp().clamp(max=1.0)
        return torch.cat(ids, 1), probs

    def start_streams(
        self, residual: torch.Tensor, sources: torch.Tensor, rows: torch.Tensor, embeddings: torch.Tensor
    ) -> torch.Tensor:
        """Rows of the last layers: the batch's own, and copies of some of those that become streams.

        Args:
            residual: [batch rows, hidden].
            sources: [rows] int64, which of these each row begins as.
            rows: [anchors * streams] int64, those that are streams, of an anchor together and in order.
            embeddings: [streams, hidden], what is added to each.

        Returns:
            [rows, hidden].
        """
        started = residual.index_select(0, sources)
        return started.index_add_(0, rows, embeddings.repeat(len(rows) // len(embeddings), 1))

    def change_first_(
        self, change: TokenChange, said: torch.Tensor, embeddings: torch.Tensor
    ) -> torch.Tensor:
        """Has the first stream of each row say what it says behind the token that is known by now.

        Args:
            change: What that token changes.
            said: [anchors, streams, hidden], what streams say behind any; the first ones are overwritten.
            embeddings: [anchors, hidden], those tokens'.

        Returns:
            [anchors, streams, rank] float32: V s of each, as it was.
        """
        units = F.linear(unit(said), change.said.float())
        of_before = F.linear(unit(embeddings), change.before.float())
        said[:, 0] += (F.silu(units[:, 0] + of_before) @ change.up.float()).to(said.dtype)
        return units

    def likeliest_behind(
        self,
        change: TokenChange,
        units: torch.Tensor,
        places: torch.Tensor,
        probs: torch.Tensor,
        temperature: torch.Tensor,
        number: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest candidates of each stream behind each candidate of the stream before.

        Args:
            change: What tokens before change; nothing in the first stream.
            units: [anchors, streams, rank] float32, from `change_first_`.
            places: [anchors, streams, tokens] int64, candidates, in the draft's vocabulary; -1 for one
                that is not in it, whose probability is 0.
            probs: [anchors, streams, tokens] float32, how likely they are behind any.
            temperature: [anchors] float32.
            number: How many, up to `tokens`.

        Returns:
            [anchors, streams, tokens, number] twice: int64, where the likeliest are among the candidates, and
            float32, how likely. In the first stream they are the same behind all.
        """
        places = places.clamp(min=0)
        before = F.silu(units[:, 1:].unsqueeze(2) + change.befores[places[:, :-1]])
        changes = before @ change.afters[places[:, 1:]].transpose(-1, -2) / temperature.view(-1, 1, 1, 1)
        rest = (1.0 - probs.sum(-1, keepdim=True)).clamp(min=0.0)  # of tokens that are not considered
        logits = torch.cat((probs, rest), -1).log().unsqueeze(2).repeat(1, 1, probs.shape[2], 1)
        logits[:, 1:, :, :-1] += changes
        chances, index = logits.softmax(-1)[..., :-1].topk(number)
        return index, chances

    def stream_candidates(
        self,
        change: TokenChange,
        head: Linear,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        embedding: torch.Tensor,
        before: torch.Tensor,
        number: int,
        most: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All between what streams said and what greedy sequences may go on with.

        Args:
            change: What tokens before change.
            head: The draft's output head.
            hidden: [rows, streams, hidden], what streams say behind any token.
            anchors: [anchors] int64, which rows are meant.
            embedding: [tokens, hidden], the target's.
            before: [anchors] int64, the token that is known by now.
            number: Candidates of a stream, up to the head's tokens.
            most: The likeliest of them behind each of the stream before, up to `number`.

        Returns:
            [anchors, streams, number] int64, where candidates are in the draft's vocabulary, and what
            `likeliest_behind` gives of them.
        """
        said = hidden.index_select(0, anchors)
        units = self.change_first_(change, said, embedding.index_select(0, before))
        nothing = torch.zeros(len(said) * said.shape[1], dtype=torch.int64, device=said.device)
        logits = head(said.flatten(0, 1))
        found = self.noisy_topk(logits, number, nothing, nothing, nothing.bool())
        places, probs = (of.view(len(said), -1, number) for of in found)
        temperature = torch.ones(len(said), device=said.device)
        return places, *self.likeliest_behind(change, units, places, probs, temperature, most)

    def exit_probs(
        self,
        weights: EarlyExit,
        x: torch.Tensor,
        rows: torch.Tensor,
        token_ids: torch.Tensor,
        q: torch.Tensor,
    ) -> torch.Tensor:
        """Probabilities that tokens follow rows, as the early exit sees it.

        Args:
            weights: Its weights.
            x: [rows, hidden], normed states where streams begin.
            rows: [tokens] int64, the row that each would follow.
            token_ids: [tokens] int64.
            q: [tokens] float32, what drafting gave each.

        Returns:
            [tokens] float32.
        """
        return torch.sigmoid(exit_logits(weights, x[rows], token_ids, q))
