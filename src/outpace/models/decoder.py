"""One decoder for the whole Llama family; `ModelConfig` says in what its members differ."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch

from outpace.kernels import Cache, Heads, Kernels, Layer, LayerAttention, LayerStack, Linear, RopeTable, Rows
from outpace.models.config import ModelConfig, RopeConfig
from outpace.models.draft_vocab import DraftVocab

Total = Callable[[torch.Tensor], torch.Tensor]  # of the summands that the ranks have, [rows, hidden] each


class Decoder:
    """Embedding, layers, final norm and head. Holds no state between passes.

    The residual stream and everything that enters or leaves a kernel is in the model's dtype; sums are in
    float32.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, torch.Tensor],
        dtype: torch.dtype,
        kernels: Kernels,
        total: Total | None = None,
    ) -> None:
        """Packs the weights.

        Args:
            config: The model's shape, or that of a shard.
            weights: As `config.weight_shapes()` names them, in `dtype`; without its own output head it has
                no logits. Emptied as they are packed, so that they are not in memory twice.
            dtype: float32 or bfloat16.
            kernels: Who computes.
            total: Of a shard: adds what the out and down projections of all ranks give.
        """
        self.config, self.dtype, self.kernels = config, dtype, kernels
        self._heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim)
        self._embedding = weights.pop("model.embed_tokens.weight")
        table = rope_table(config.rope, config.head_dim, config.max_position_embeddings)
        self._rope = RopeTable(table.to(self.device))
        self._layers = tuple(_layer(config, weights, i, kernels, total) for i in range(config.num_layers))
        self._norm = weights.pop("model.norm.weight")
        head = self._embedding if config.tie_word_embeddings else weights.pop("lm_head.weight", None)
        self._head = None if head is None else kernels.linear(head)

    def first_layers(self, num_layers: int) -> Decoder:
        """The first layers, then the final norm and the head, as a decoder that shares its weights with this.

        Args:
            num_layers: How many, in [1, config.num_layers].
        """
        part = copy.copy(self)
        windows = self.config.sliding_windows[:num_layers]
        part.config = replace(self.config, num_layers=num_layers, sliding_windows=windows)
        part._layers = self._layers[:num_layers]
        return part

    def with_layers(
        self, config: ModelConfig, weights: dict[str, torch.Tensor], vocab: DraftVocab
    ) -> Decoder:
        """Other layers and another final norm, as a decoder that shares embedding and head with this.

        Args:
            config: Their shape, of a whole model also where this one is a shard.
            weights: As `config.own_weight_shapes()` names them; emptied.
            vocab: The tokens that its head is over.
        """
        other = copy.copy(self)
        other.config = config
        other._heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim)
        other._layers = tuple(_layer(config, weights, i, self.kernels) for i in range(config.num_layers))
        other._norm = weights.pop("model.norm.weight")
        if vocab.token_ids is not None:
            other._head = self.head(vocab)
        return other

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self._embedding.device

    def stack(self, cache: Cache) -> LayerStack:
        """Its layers over a cache, which has keys and values of each, as `LayerAttention` states them."""
        return self.kernels.stack(self._layers, cache, self._norm, self.config.rms_norm_eps)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The residual stream before the first layer: [rows] int64 -> [rows, hidden]."""
        return self._embedding.index_select(0, token_ids)

    @property
    def embedding(self) -> torch.Tensor:
        """[vocab, hidden]."""
        return self._embedding

    def head_weight(self) -> torch.Tensor:
        """The output head's weight, [vocab, hidden]; a copy where the head is not the embedding."""
        if self.config.tie_word_embeddings:
            return self._embedding
        # Packed weights are not kept unpacked; a unit vector reads a column of them, exactly.
        return self.logits(
            torch.eye(self.config.hidden_size, dtype=self.dtype, device=self.device)
        ).T.contiguous()

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, rows: Rows, stack: LayerStack) -> torch.Tensor:
        """Runs all layers and writes the keys and values of every row.

        Args:
            token_ids: [rows] int64.
            rows: Where they stand.
            stack: The layers.

        Returns:
            [rows, hidden]: hidden states after the final norm.
        """
        return stack.run(self.attention(rows), self.embed(token_ids))

    def attention(self, rows: Rows) -> LayerAttention:
        """Attention of a pass."""
        return self.kernels.attention(self._heads, self._rope, self.config.rms_norm_eps, rows)

    def head(self, vocab: DraftVocab) -> Linear:
        """The output head for some tokens: [rows, hidden] -> [rows, tokens of `vocab`]."""
        return self.logits if vocab.token_ids is None else self.kernels.linear(vocab.rows(self.head_weight()))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output head: [rows, hidden] -> [rows, vocab]."""
        assert self._head is not None, "only the first rank has the head"
        return self._head(hidden)


def _layer(
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    index: int,
    kernels: Kernels,
    total: Total | None = None,
) -> Layer:
    prefix = f"model.layers.{index}."

    def take(name: str) -> torch.Tensor:
        return weights.pop(prefix + name)

    def linear(*names: str) -> Linear:
        weight = torch.cat([take(f"{name}.weight") for name in names])
        has_bias = f"{prefix}{names[0]}.bias" in weights
        return kernels.linear(
            weight, torch.cat([take(f"{name}.bias") for name in names]) if has_bias else None
        )

    def summed(linear: Linear) -> Linear:
        return linear if total is None else lambda x: total(linear(x))

    return Layer(
        input_norm=take("input_layernorm.weight"),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=take("self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm=take("self_attn.k_norm.weight") if config.qk_norm else None,
        out=summed(linear("self_attn.o_proj")),
        post_norm=take("post_attention_layernorm.weight"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=summed(linear("mlp.down_proj")),
        window=config.sliding_windows[index] if config.sliding_windows else None,
    )


def rope_table(rope: RopeConfig, head_dim: int, max_position: int) -> torch.Tensor:
    """Cosines and sines by position: [max_position, head_dim] float32, cosines first.

    Scaling follows transformers' `modeling_rope_utils`: linear (Chen et al. 2023), llama3 (by wavelength),
    yarn (Peng et al. 2023, with its attention factor folded in).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse = 1.0 / rope.theta**exponents  # [head_dim / 2] radians per position
    scale = 1.0
    match rope.kind:
        case "linear":
            inverse = inverse / rope.factor
        case "llama3":
            inverse = _llama3(rope, inverse)
        case "yarn":
            inverse = _yarn(rope, inverse, head_dim)
            scale = rope.attention_factor
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inverse)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scale


def _llama3(rope: RopeConfig, inverse: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    wavelength = 2 * math.pi / inverse
    long = rope.original_max_position / rope.low_freq_factor
    short = rope.original_max_position / rope.high_freq_factor
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * inverse / rope.factor + blend * inverse
    scaled = torch.where(wavelength > long, inverse / rope.factor, inverse)
    return torch.where((wavelength <= long) & (wavelength >= short), blended, scaled)


def _yarn(rope: RopeConfig, inverse: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Dimensions that turn often within the original context are kept, slow ones stretched."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    return inverse / rope.factor * ramp + inverse * (1 - ramp)
