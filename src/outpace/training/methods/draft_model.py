"""A small model that continues as the target does: the draft of the classical method, by distillation.

It has the target's shape but for the number of layers, begins as the target's first layers with its final
norm, and shares its embedding and some tokens' rows of its output head, which stay as they are: only what
lies between is trained and saved. The loss is

    (1 - w) · cross entropy of the answers + w · KL(target || draft), at temperature 1, w = `kl_weight`

On answers that are the target's own (`outpace distill`) the first is sequence-level distillation (Kim and
Rush, 2016), the second teaches the target's whole distribution at each token (Hinton et al., 2015; forward
KL as in DistillSpec, Zhou et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from outpace.config import setting
from outpace.errors import ConfigError
from outpace.models.convert import hugging_face_config
from outpace.models.draft_checkpoint import embedding_checksum, write_draft
from outpace.models.draft_vocab import DraftVocab
from outpace.training.losses import Teacher, draft_loss
from outpace.training.method import HeadSettings, Recipe, Run, TrainableDraft, TrainBatch, section
from outpace.training.trunk import Trunk, document_lengths


@dataclass(frozen=True)
class Settings(HeadSettings):
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
        self._trunk, self._run, self._settings = trunk, run, settings
        self.vocab: DraftVocab = run.draft_vocab(settings, trunk)
        self._head = self.vocab.rows(trunk.head_weight)  # [tokens, hidden]
        self.hidden_layers = (config.num_layers,)
        # copies: in float32 they would be the frozen target's own weights
        weights = {name: trunk.model.state_dict()[name].clone() for name in small.weight_shapes()}
        self._small = Trunk(small, weights, device=trunk.device)
        self.layers = self._small.model.model.layers.requires_grad_(True)
        self.norm = self._small.model.model.norm.requires_grad_(True)

    def loss(self, batch: TrainBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross entropy of the next token, and how far its distribution is from the target's."""
        trunk, small = self._trunk, self._small
        kept = batch.documents >= 0
        is_low = trunk.dtype is torch.bfloat16
        with torch.autocast(trunk.device.type, dtype=torch.bfloat16, enabled=is_low):
            hidden, lengths = trunk.embed(batch.token_ids[kept]).float(), document_lengths(batch.documents)
            hidden = small.layers(hidden, batch.positions[kept], lengths, 0, small.config.num_layers)
        targets, valid = (of[kept] for of in batch.future(0))
        said, wanted = self.norm(hidden[valid]), batch.hidden[trunk.config.num_layers][kept][valid]
        teacher = Teacher(wanted, self._head, self._settings.kl_weight)
        loss, right = draft_loss(said, self._head, self.vocab, targets[valid], teacher=teacher)
        count = max(1, int(valid.sum()))
        return loss / count, {"accuracy_1": float(right.sum()) / count}

    def served(self) -> dict[str, torch.Tensor]:
        """See TrainableDraft."""
        weights = self._small.model.state_dict()
        return {name: weights[name] for name in self._small.config.own_weight_shapes()}

    def save(self, directory: Path) -> None:
        """Writes the layers and the norm, with the shape of a whole model and whose embedding it shares."""
        trunk, small = self._trunk, self._small
        dtype = self._run.save_dtype or trunk.dtype
        own = {name: weight.to(dtype) for name, weight in self.served().items()}
        settings = {
            "num_layers": small.config.num_layers,
            "embedding_sha256": embedding_checksum(trunk.model.model.embed_tokens.weight),
        }
        shape = hugging_face_config(small.config) | {"dtype": str(dtype).removeprefix("torch.")}
        write_draft(directory, section(trunk, self._run, 1) | shape, settings, own, self.vocab)


def create(trunk: Trunk, run: Run, settings: Settings) -> DraftModel:
    """Builds the small model, untrained."""
    return DraftModel(trunk, run, settings)
