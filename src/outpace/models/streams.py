"""The weights of Speculative Streaming (Bhendawade et al., 2024) beside those of a decoder.

    S_j = M + P_j                          stream j of a row with residual M, before the last layers
    y   = W x + B (A x)                    what a linear layer of those gives for a stream row (lossless mode)
    s'  = s + U silu(V s + E e)                what a stream says, s, once the token before its own is known
    p   = sigmoid(a·log q + (s·w + b)·h + c)   that a token with head row w follows a row: the early exit

A stream guesses its token without knowing those before it. When a draft is made the first of these is known,
and behind each of the others stand few candidates: s' is what the stream says behind a token with embedding e
(e and s of unit rms where they go into V and E). The paper has no such step; Hydra (Ankner et al., 2024)
gives Medusa's heads one.

The early exit has the paper's o_θ, h = x + U (V x) with x the normed state where streams begin, but p is
fitted to whether a drafted token came true, with q, what its stream gave it, as evidence. So it needs the
head's rows of drafted tokens only, not the whole head, which in small models is a fifth of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from outpace.errors import ConfigError
from outpace.kernels import EarlyExit, Kernels, Layer, LayerStack, Linear, TokenChange
from outpace.kernels.stream_heads import unit
from outpace.models.config import ModelConfig
from outpace.models.decoder import Decoder
from outpace.models.draft_vocab import DraftVocab

# The linear layers of a decoder layer, as it has them fused: their parts, and what each part reads.
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
PARTS = tuple(part for parts in FUSED.values() for part in parts)
TARGETS = tuple(part.split(".")[1] for part in PARTS)


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """The shape of streams.

    Attributes:
        num_streams: γ, the tokens that streams look ahead: the depth of drafts.
        num_stream_layers: Ns, the last layers, which stream rows go through.
        branching: Tokens of each stream that a draft may branch to.
        lora_rank: Rank of the adapters of stream rows; 0 where streams use the model's own weights.
        lora_targets: Linear layers with an adapter, e.g. `q_proj`.
        exit_rank: Rank of the early exit; 0 without one.
        token_rank: Rank of what the token before changes in what a stream says; 0 without.
    """

    num_streams: int = 4
    num_stream_layers: int = 4
    branching: int = 4
    lora_rank: int = 32
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    exit_rank: int = 8
    token_rank: int = 0

    def __post_init__(self) -> None:
        """Checks what can be checked without the model.

        Raises:
            ConfigError: A number is out of range or odd, or a target is no linear layer.
        """
        for name in ("num_streams", "num_stream_layers", "branching"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of streams must be at least 1, got {getattr(self, name)}")
        if self.token_rank < 0:
            raise ConfigError(f"token_rank of streams must be at least 0, got {self.token_rank}")
        for name in ("lora_rank", "exit_rank"):
            rank = getattr(self, name)
            if rank < 0 or rank % 2:  # kernels take bfloat16 inputs in pairs
                raise ConfigError(f"{name} of streams must be even and at least 0, got {rank}")
        if unknown := set(self.lora_targets) - set(TARGETS):
            found = ", ".join(sorted(map(str, unknown)))
            raise ConfigError(f"lora_targets of streams must be among {', '.join(TARGETS)}, got {found}")
        if bool(self.lora_rank) != bool(self.lora_targets):
            raise ConfigError(
                f"lora_rank {self.lora_rank} of streams does not go with {len(self.lora_targets)} "
                "lora_targets: give both, or 0 and none"
            )

    def weight_shapes(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight.

        Args:
            model: The model that they are for.

        Raises:
            ConfigError: It has too few layers.
        """
        if self.num_stream_layers >= model.num_layers:
            raise ConfigError(
                f"num_stream_layers of streams must be below the model's {model.num_layers} layers, "
                f"got {self.num_stream_layers}"
            )
        shapes: dict[str, tuple[int, ...]] = {"embeddings": (self.num_streams, model.hidden_size)}
        shapes |= self.adapter_shapes(model, model.num_layers - self.num_stream_layers)
        if self.exit_rank:
            shapes["exit.down.weight"] = (self.exit_rank, model.hidden_size)
            shapes["exit.up.weight"] = (model.hidden_size, self.exit_rank)
            shapes["exit.bias.weight"] = (model.hidden_size,)
            shapes["exit.scalars"] = (3,)
        if self.token_rank:
            shapes["token.said.weight"] = (self.token_rank, model.hidden_size)
            shapes["token.before.weight"] = (self.token_rank, model.hidden_size)
            shapes["token.up.weight"] = (model.hidden_size, self.token_rank)
        return shapes

    def adapter_shapes(self, model: ModelConfig, first_layer: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of the adapters' weights, from a layer on."""
        shapes: dict[str, tuple[int, ...]] = {}
        plain = model.weight_shapes()
        for index in range(first_layer, model.num_layers):
            for part in PARTS:
                if part.split(".")[1] in self.lora_targets:
                    rows, columns = plain[f"model.layers.{index}.{part}.weight"]
                    shapes[f"layers.{index}.{part}.lora_A.weight"] = (self.lora_rank, columns)
                    shapes[f"layers.{index}.{part}.lora_B.weight"] = (rows, self.lora_rank)
        return shapes


@dataclass(frozen=True, slots=True)
class LowRank:
    """A low-rank change of a linear layer: x -> up(down(x))."""

    down: Linear
    up: Linear


@dataclass(frozen=True, slots=True)
class LayerAdapters:
    """The changes of a layer's linear layers; None where one has none."""

    qkv: LowRank | None
    out: LowRank | None
    gate_up: LowRank | None
    down: LowRank | None

    def on(self, layer: Layer, rows: torch.Tensor, kernels: Kernels) -> Layer:
        """The layer, changed for the given rows."""

        def changed(change: LowRank | None, linear: Linear) -> Linear:
            return linear if change is None else kernels.changed(linear, change.down, change.up, rows)

        return replace(
            layer,
            qkv=changed(self.qkv, layer.qkv),
            out=changed(self.out, layer.out),
            gate_up=changed(self.gate_up, layer.gate_up),
            down=changed(self.down, layer.down),
        )


class Streams:
    """Stream embeddings, adapters and early exit, packed for serving.

    Attributes:
        config: Their shape.
        early_exit: Or None where there is none.
        change: What tokens before change in what streams say; None where they change nothing.
    """

    def __init__(
        self, config: StreamConfig, weights: dict[str, torch.Tensor], decoder: Decoder, vocab: DraftVocab
    ) -> None:
        """Packs the weights.

        Args:
            config: Their shape.
            weights: As `config.weight_shapes` names them for the decoder's model, in its dtype.
            decoder: The model.
            vocab: The tokens that streams draft.
        """
        self.config = config
        self._embeddings, self._kernels = weights["embeddings"], decoder.kernels
        model = decoder.config
        self._adapters = tuple(
            _adapters(weights, f"layers.{index}.", model, decoder.kernels)
            for index in range(model.num_layers - config.num_stream_layers, model.num_layers)
        )
        self.early_exit = _early_exit(weights, decoder.head_weight()) if config.exit_rank else None
        self.change = _token_change(weights, decoder, vocab) if config.token_rank else None

    def start(self, residual: torch.Tensor, sources: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The rows of the layers that streams go through, as `Kernels.start_streams` has them."""
        return self._kernels.start_streams(residual, sources, rows, self._embeddings)

    def adapt(self, stack: LayerStack, rows: torch.Tensor) -> LayerStack:
        """The model's layers, the last with their adapters for the rows of streams, [streams] int64."""
        if not self.config.lora_rank:
            return stack
        last = stack.layers[-self.config.num_stream_layers :]
        changed = [
            own.on(layer, rows, self._kernels) for layer, own in zip(last, self._adapters, strict=True)
        ]
        return stack.ending_in(changed)


def _early_exit(weights: dict[str, torch.Tensor], head: torch.Tensor) -> EarlyExit:
    """The early exit's weights."""
    down, up, bias, scalars = (
        weights[f"exit.{name}"].float() for name in ("down.weight", "up.weight", "bias.weight", "scalars")
    )
    return EarlyExit(down, up.T.contiguous(), bias, scalars, head)


def _token_change(weights: dict[str, torch.Tensor], decoder: Decoder, vocab: DraftVocab) -> TokenChange:
    """What tokens before change, and what it needs of each token."""
    said, before, up = (weights[f"token.{name}.weight"] for name in ("said", "before", "up"))
    up = up.T.contiguous()
    befores = F.linear(unit(vocab.rows(decoder.embedding)), before.float())
    afters = F.linear(vocab.rows(decoder.head_weight()), up).float()
    return TokenChange(said, before, up, befores, afters)


def _adapters(
    weights: dict[str, torch.Tensor], prefix: str, model: ModelConfig, kernels: Kernels
) -> LayerAdapters:
    """One layer's adapters."""
    plain = model.weight_shapes()

    def fused(parts: tuple[str, ...]) -> LowRank | None:
        has = [part for part in parts if f"{prefix}{part}.lora_A.weight" in weights]
        if not has:
            return None
        downs = [weights[f"{prefix}{part}.lora_A.weight"] for part in has]
        ups = [
            weights[f"{prefix}{part}.lora_B.weight"]
            if part in has
            else downs[0].new_zeros(plain[f"model.{prefix}{part}.weight"][0], 0)
            for part in parts
        ]
        return LowRank(kernels.linear(torch.cat(downs)), kernels.linear(torch.block_diag(*ups)))

    return LayerAdapters(**{name: fused(parts) for name, parts in FUSED.items()})
