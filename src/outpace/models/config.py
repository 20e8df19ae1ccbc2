"""The shape of a model: everything in which the supported architectures differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding and its scaling.

    Attributes:
        theta: Base of the frequencies.
        kind: `default`, `linear`, `llama3` or `yarn`.
        factor: Context stretch (all kinds but default).
        original_max_position: Context length before stretching (llama3, yarn).
        low_freq_factor: llama3.
        high_freq_factor: llama3.
        beta_fast: yarn.
        beta_slow: yarn.
        attention_factor: yarn: scale of cos and sin.
        truncate: yarn: whether the correction range is rounded to whole dimensions.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-family decoder.

    Attributes:
        architecture: The Hugging Face class name, e.g. `LlamaForCausalLM`.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Width of a head; not always hidden_size / num_heads.
        rms_norm_eps: Epsilon of all norms.
        max_position_embeddings: Longest context.
        rope: Rotary embedding.
        qkv_bias: Whether q, k and v projections have a bias (Qwen2, some Llama).
        out_bias: Whether the attention output projection has one (some Llama).
        mlp_bias: Whether the MLP projections have one (some Llama).
        qk_norm: Whether q and k heads are RMS-normalised before rotation (Qwen3).
        tie_word_embeddings: Whether the output head is the embedding.
        sliding_windows: Per layer how many of the latest tokens it attends to (itself included), or None
            for all.
        eos_token_ids: Tokens that end an answer, from the model's own configuration.
        bos_token_id: Beginning-of-sequence token, if any.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, as Hugging Face checkpoints name them.

        A tied output head is not among them.
        """
        h, m = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for i in range(self.num_layers):
            layer = f"model.layers.{i}."
            projections = {
                "self_attn.q_proj": (q, h, self.qkv_bias),
                "self_attn.k_proj": (kv, h, self.qkv_bias),
                "self_attn.v_proj": (kv, h, self.qkv_bias),
                "self_attn.o_proj": (h, q, self.out_bias),
                "mlp.gate_proj": (m, h, self.mlp_bias),
                "mlp.up_proj": (m, h, self.mlp_bias),
                "mlp.down_proj": (h, m, self.mlp_bias),
            }
            for name, (rows, columns, bias) in projections.items():
                shapes[f"{layer}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{layer}{name}.bias"] = (rows,)
            shapes[f"{layer}input_layernorm.weight"] = (h,)
            shapes[f"{layer}post_attention_layernorm.weight"] = (h,)
            if self.qk_norm:
                shapes[f"{layer}self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{layer}self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["model.norm.weight"] = (h,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, h)
        return shapes

    def own_weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of `weight_shapes` without the embedding and the head, which another model may share."""
        shared = ("model.embed_tokens.weight", "lm_head.weight")
        return {name: shape for name, shape in self.weight_shapes().items() if name not in shared}
