"""The frozen target in plain torch: what the serving decoder computes, differentiable and on any device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from outpace.models.config import ModelConfig
from outpace.models.convert import hugging_face_config
from outpace.models.decoder import rope_table
from outpace.models.hub import resolve_model
from outpace.models.loader import load_config, load_weights


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
                attn_implementation="sdpa",
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
        self, hidden: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, first: int, last: int
    ) -> torch.Tensor:
        """Runs layers [first, last).

        Args:
            hidden: [batch, rows, hidden], the residual stream that enters layer `first`.
            positions: [batch, rows] int64.
            mask: [batch, 1, rows, rows] bool: which rows (last) each row attends to. Sliding windows are cut
                out of it by position here.
            first: The first layer.
            last: The layer after the last one.

        Returns:
            [batch, rows, hidden], the residual stream that enters layer `last`.
        """
        rotation = self._cos[positions], self._sin[positions]
        distance = positions[:, None, :, None] - positions[:, None, None, :]
        windows = self.config.sliding_windows or (None,) * self.config.num_layers
        masks: dict[int | None, torch.Tensor] = {}  # by window, as they are added to scores
        for layer, window in zip(self.model.model.layers[first:last], windows[first:last], strict=True):
            if window not in masks:
                seen = mask if window is None else mask & (distance < window)
                masks[window] = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill_(~seen, -torch.inf)
            hidden = layer(hidden, attention_mask=masks[window], position_embeddings=rotation)
        return hidden

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
        mask = document_mask(positions, documents)
        hidden, states, done = self.embed(token_ids), {}, 0
        for layer in sorted(layers):
            hidden, done = self.layers(hidden, positions, mask, done, layer), layer
            states[layer] = self.norm(hidden) if layer == self.config.num_layers else hidden
        return states


def document_mask(positions: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """[batch, 1, rows, rows] bool: each row attends to those of its document up to itself."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & (positions[:, None, None, :] <= positions[:, None, :, None])


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
