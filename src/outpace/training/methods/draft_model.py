"""A small model that continues as the target does: the draft of the classical method, by distillation.

It has the target's shape but for the number of layers, begins as the target's first layers with its final
norm, and shares its embedding and output head, which stay as they are: so only what lies between is trained,
and a large vocabulary costs no training. Cross entropy on answers; with `outpace distill` those are the
target's own, which is sequence-level distillation (Kim and Rush, 2016). Saved as an ordinary model directory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from outpace.config import setting
from outpace.errors import ConfigError
from outpace.models.convert import hugging_face_config
from outpace.models.draft_checkpoint import write_draft
from outpace.models.tokenizer import load_tokenizer
from outpace.training.losses import head_cross_entropy
from outpace.training.method import Recipe, Run, TrainableDraft, TrainBatch, section
from outpace.training.trunk import Trunk, document_mask


@dataclass(frozen=True)
class Settings:
    """What can be chosen."""

    num_layers: int = setting(2, "Layers of the small model")


class DraftModel(TrainableDraft):
    """The small model.

    Attributes:
        layers: What is trained, and
        norm: the final norm.
    """

    recipe = Recipe(lr=1e-3)

    def __init__(self, trunk: Trunk, run: Run, settings: Settings) -> None:
        """The target's first layers.

        Raises:
            ConfigError: The target has no more layers than that.
        """
        super().__init__()
        config, num_layers = trunk.config, settings.num_layers
        if num_layers >= config.num_layers:
            raise ConfigError(
                f"num_layers of draft_model must be below the target's {config.num_layers}, got {num_layers}"
            )
        small = replace(config, num_layers=num_layers, sliding_windows=config.sliding_windows[:num_layers])
        weights = trunk.model.state_dict()
        self._trunk, self._run = trunk, run
        self._small = Trunk(
            small, {name: weights[name] for name in small.weight_shapes()}, device=trunk.device
        )
        self.layers = self._small.model.model.layers.requires_grad_(True)
        self.norm = self._small.model.model.norm.requires_grad_(True)

    def loss(self, batch: TrainBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross entropy of the next token."""
        trunk, small = self._trunk, self._small
        mask = document_mask(batch.positions, batch.documents)
        is_low = trunk.dtype is torch.bfloat16
        with torch.autocast(trunk.device.type, dtype=torch.bfloat16, enabled=is_low):
            hidden = trunk.embed(batch.token_ids).float()
            hidden = small.layers(hidden, batch.positions, mask, 0, small.config.num_layers)
        targets, valid = batch.future(0)
        loss, best = head_cross_entropy(self.norm(hidden[valid]), trunk.head_weight, targets[valid])
        count = max(1, int(valid.sum()))
        return loss / count, {"accuracy_1": float((best == targets[valid]).sum()) / count}

    def save(self, directory: Path) -> None:
        """Writes a model directory: weights, configuration and the target's tokenizer."""
        trunk, small = self._trunk, self._small
        weights = small.model.state_dict()
        dtype = self._run.save_dtype or trunk.dtype
        weights = {name: weights[name].to(dtype) for name in small.config.weight_shapes()}
        names = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
        shape = hugging_face_config(small.config) | {
            "bos_token_id": small.config.bos_token_id,
            "eos_token_id": list(small.config.eos_token_ids) or None,
            "dtype": names[dtype],
        }
        load_tokenizer(self._run.path).save_pretrained(directory)
        write_draft(directory, section(trunk, self._run, 1) | shape, {}, weights)


def create(trunk: Trunk, run: Run, settings: Settings) -> DraftModel:
    """Builds the small model, untrained."""
    return DraftModel(trunk, run, settings)
