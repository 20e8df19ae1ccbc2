"""The target itself, fine-tuned as usual: cross entropy of what the assistant answered, all weights.

It drafts nothing. It is the baseline that drafts are trained for where a task has a model of its own, and
what `streaming --mode shared` is to be compared with. Saved as an ordinary model directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from outpace.config import setting
from outpace.models.convert import write_model
from outpace.models.tokenizer import load_tokenizer
from outpace.training.losses import head_loss
from outpace.training.method import Recipe, Run, Trainable, TrainBatch
from outpace.training.trunk import Trunk, document_lengths


@dataclass(frozen=True)
class Settings:
    """What can be chosen."""

    embedding: bool = setting(True, "Whether the embedding and the output head are trained, too")


class Finetune(Trainable):
    """A copy of the model in float32; products are in the trunk's dtype.

    Attributes:
        layers: What is trained,
        norm: the final norm,
        ends: and the embedding, with the output head if that is a weight of its own; nothing if they stay.
    """

    recipe = Recipe(lr=1e-4)

    def __init__(self, trunk: Trunk, run: Run, settings: Settings) -> None:
        """The model as it is."""
        super().__init__()
        weights = {name: trunk.model.state_dict()[name].clone() for name in trunk.config.weight_shapes()}
        self._trunk, self._run = trunk, run
        self._tuned = Trunk(trunk.config, weights, device=trunk.device)
        model = self._tuned.model
        self.layers = model.model.layers.requires_grad_(True)
        self.norm = model.model.norm.requires_grad_(True)
        ends = self._ends() if settings.embedding else []
        self.ends = torch.nn.ParameterList(ends).requires_grad_(True)

    def _ends(self) -> list[torch.nn.Parameter]:
        """The embedding, then the output head unless it is tied: then it is the embedding's parameter."""
        model = self._tuned.model
        head = [] if self._tuned.config.tie_word_embeddings else [model.lm_head.weight]
        return [model.model.embed_tokens.weight, *head]

    def loss(self, batch: TrainBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross entropy of the next token."""
        tuned, dtype = self._tuned, self._trunk.dtype
        kept = batch.documents >= 0
        is_low = dtype is torch.bfloat16
        with torch.autocast(tuned.device.type, dtype=torch.bfloat16, enabled=is_low):
            hidden, lengths = tuned.embed(batch.token_ids[kept]), document_lengths(batch.documents)
            hidden = tuned.layers(hidden, batch.positions[kept], lengths, 0, tuned.config.num_layers)
        targets, valid = (of[kept] for of in batch.future(0))
        head = self._ends()[-1].to(dtype)
        found = head_loss(self.norm(hidden[valid]), head, targets[valid])
        count = max(1, int(valid.sum()))
        return found.loss / count, {"accuracy_1": float((found.best == targets[valid]).sum()) / count}

    def save(self, directory: Path) -> None:
        """Writes a model directory: weights, configuration and tokenizer."""
        weights = self._tuned.model.state_dict()
        dtype, shapes = self._run.save_dtype or self._trunk.dtype, self._tuned.config.weight_shapes()
        tuned = {name: weights[name].to(dtype) for name in shapes}
        write_model(directory, self._tuned.config, tuned, load_tokenizer(self._run.path))


def create(trunk: Trunk, run: Run, settings: Settings) -> Finetune:
    """Builds the model, not tuned yet."""
    return Finetune(trunk, run, settings)
