"""The frozen target in plain torch: what the serving decoder computes, differentiable and on any device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from outpace.models.config import ModelConfig
from outpace.models.convert import hugging_face_config
from outpace.models.decoder import rope_table
from outpace.models.hub import resolve_model
from outpace.models.loader import load_config, load_weights

_ATTENTION = "outpace_documents"


class Trunk:
    """transformers' model with the weights of our loader, run layer by layer; not trained, so no Module.

    Attributes:
        config: Its shape.
        model: transformers' model, frozen.
        dtype: Of weights and hidden states.
        device: Where it is.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, torch.Tensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Builds the model.

        Args:
            config: Its shape.
            weights: As `config.weight_shapes()` names them.
            dtype: float32 or bfloat16.
            device: Where to.
        """
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        settings = hugging_face_config(config)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(settings.pop("model_type"), **settings),
                dtype=dtype,
                attn_implementation=_ATTENTION,
            )
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        placed = {name: weight.to(self.device, dtype) for name, weight in weights.items()}
        self.model.load_state_dict(placed | {"lm_head.weight": placed[head]}, assign=True)
        self.model.requires_grad_(False).eval()
        table = rope_table(config.rope, config.head_dim, config.max_position_embeddings)
        cos, sin = table.to(self.device).chunk(2, dim=-1)
        # transformers rotates the two halves of a head with the same angles
        self._cos, self._sin = (torch.cat((half, half), dim=-1).to(dtype) for half in (cos, sin))

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> Trunk:
        """Reads a Hugging Face directory or a GGUF file.

        Raises:
            ConfigError: It cannot be read.
        """
        config = load_config(path)
        return cls(config, load_weights(path, config, dtype), dtype, device)

    @property
    def head_weight(self) -> torch.Tensor:
        """[vocab, hidden]: the output head."""
        # detached: a module that keeps a Parameter would count it among its own
        weight: torch.Tensor = self.model.lm_head.weight.detach()
        return weight

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[...] int64 -> [..., hidden]: the residual stream that enters layer 0."""
        return F.embedding(token_ids, self.model.model.embed_tokens.weight)

    def layers(
        self, hidden: torch.Tensor, positions: torch.Tensor, lengths: Sequence[int], first: int, last: int
    ) -> torch.Tensor:
        """Runs layers [first, last).

        Args:
            hidden: [rows, hidden], the residual stream that enters layer `first`: documents one after the
                other. Each row attends to those of its document up to itself.
            positions: [rows] int64, rising by one within each document.
            lengths: Rows of each document.
            first: The first layer.
            last: The layer after the last one.

        Returns:
            [rows, hidden], the residual stream that enters layer `last`.
        """
        rotation = self._cos[positions][None], self._sin[positions][None]
        windows = self.config.sliding_windows or (None,) * self.config.num_layers
        masks: dict[int | None, list[torch.Tensor | None]] = {}  # by window, of each document
        hidden = hidden[None]
        for layer, window in zip(self.model.model.layers[first:last], windows[first:last], strict=True):
            if window not in masks:
                masks[window] = [_window_mask(length, window, hidden) for length in lengths]
            hidden = layer(
                hidden,
                attention_mask=None,
                position_embeddings=rotation,
                lengths=lengths,
                masks=masks[window],
            )
        return hidden[0]

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm."""
        normed: torch.Tensor = self.model.model.norm(hidden)
        return normed

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] after the final norm -> [..., vocab] logits."""
        return F.linear(hidden, self.head_weight)

    @torch.no_grad()
    def hidden_states(
        self, token_ids: torch.Tensor, positions: torch.Tensor, documents: torch.Tensor, layers: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """Hidden states of packed rows.

        Args:
            token_ids: [batch, rows] int64.
            positions: [batch, rows] int64, within each row's document.
            documents: [batch, rows] int64, which document of its batch row each token is of.
            layers: Which states: k is what enters layer k; `config.num_layers` what the output head takes,
                after the final norm.

        Returns:
            For each of `layers` [batch, rows, hidden].
        """
        kept, lengths = documents >= 0, document_lengths(documents)
        hidden, positions = self.embed(token_ids[kept]), positions[kept]
        states, done = {}, 0
        for layer in sorted(layers):
            hidden, done = self.layers(hidden, positions, lengths, done, layer), layer
            of_layer = self.norm(hidden) if layer == self.config.num_layers else hidden
            states[layer] = of_layer.new_zeros(*kept.shape, of_layer.shape[-1])
            states[layer][kept] = of_layer
        return states


def _window_mask(length: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores of a document; None if each of its rows attends to all before it."""
    if window is None or length <= window:
        return None
    place = torch.arange(length, device=like.device)
    distance = place.unsqueeze(1) - place
    return added_mask((distance >= 0) & (distance < window), like.dtype)


def added_mask(may_see: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as it is added to scores; torch would turn one of bool into it in every layer anew."""
    return torch.zeros(may_see.shape, dtype=dtype, device=may_see.device).masked_fill_(~may_see, -torch.inf)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    lengths: Sequence[int],
    masks: Sequence[torch.Tensor | None],
    scaling: float,
    **of_model: object,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers asks for it, by document: what a mask over all would hide is not computed.

    Args:
        module: The layer's, not needed.
        query: [1, heads, rows, head_dim].
        key: [1, key heads, rows, head_dim].
        value: The same.
        attention_mask: None, `masks` tells it.
        lengths: Rows of each document.
        masks: Of each document, from `_window_mask`.
        scaling: Of scores.
        of_model: What a model says beyond that: dropout, which is 0, and the window, which is in `masks`.

    Returns:
        [1, rows, heads, head_dim], and no weights.
    """
    num_groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(num_groups, 1) for x in (key, value))
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), masks, strict=True)
    mixed = [
        F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling)
        for q, k, v, mask in parts
    ]
    return torch.cat(mixed, 2).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)


def document_lengths(documents: torch.Tensor) -> list[int]:
    """Of packed rows ([batch, rows] int64, -1 at padding): tokens of each document, in order."""
    row = torch.arange(len(documents), device=documents.device).unsqueeze(1)
    apart = row * documents.shape[1] + documents
    lengths: list[int] = apart[documents >= 0].unique_consecutive(return_counts=True)[1].tolist()
    return lengths


def load_trunk(model: str | None, dtype: torch.dtype, device: torch.device | str) -> Trunk:
    """The trunk of a model as `--model` names it.

    Raises:
        ConfigError: The model cannot be had.
    """
    return Trunk.load(resolve_model(model), dtype, device)


def fingerprint(model: str | None) -> str:
    """A checksum of a model's files, configuration and weights."""
    path = resolve_model(model)
    kinds = ("config.json", "*.safetensors")
    files = [path] if path.is_file() else sorted(file for kind in kinds for file in path.glob(kind))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
