"""The interface of everything that is trained: drafts, and a target itself.

A file `training/methods/NAME.py` has

    @dataclass(frozen=True)
    class Settings:                 # what `--settings` may set, with defaults and help (`config.setting`)
        num_heads: int = setting(4, "Heads, and so the depth of drafts")

    def create(trunk: Trunk, run: Run, settings: Settings) -> Trainable: ...

What a `TrainableDraft` saves is served by `spec/proposers/NAME.py` with `--spec-model`; what another saves is
a model, served by its directory.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from outpace import registry
from outpace.errors import ConfigError
from outpace.models.draft_checkpoint import DraftCheckpoint, speculators_section
from outpace.models.draft_vocab import DraftVocab
from outpace.training.trunk import Trunk

_PACKAGE = "outpace.training.methods"


@dataclass(frozen=True)
class Run:
    """What a method may want to know of the run it is trained in.

    Attributes:
        method: Its name.
        model: The target as the user named it.
        path: Where it is.
        seed: Of all chance.
        max_len: Longest document, in tokens.
        counts: [vocab] int64, how often each token is answered in what is trained on; None where that is
            not known, and all are drafted.
        special_ids: Tokens that are drafted however rare they are.
        save_dtype: What weights are written in; None is what they are computed in.
        init: The draft that it begins with, if any.
    """

    method: str
    model: str
    path: Path
    seed: int
    max_len: int
    counts: torch.Tensor | None = None
    special_ids: tuple[int, ...] = ()
    save_dtype: torch.dtype | None = None
    init: DraftCheckpoint | None = None

    def draft_vocab(self, settings: HeadSettings, trunk: Trunk) -> DraftVocab:
        """The tokens to draft: those of the draft it begins with, or the most frequent ones.

        Raises:
            ConfigError: It begins with a draft of another size.
        """
        if self.init is not None:
            vocab, most = self.init.vocab, trunk.config.vocab_size
            wanted = min(settings.draft_vocab_size or most, most)
            if len(vocab) != wanted:
                raise ConfigError(
                    f"the draft to begin with has {len(vocab)} tokens, draft_vocab_size is {wanted}"
                )
            return vocab
        if self.counts is None:
            return DraftVocab(trunk.config.vocab_size)
        return DraftVocab.most_frequent(
            self.counts.to(trunk.device), settings.draft_vocab_size, self.special_ids
        )


@dataclass(frozen=True)
class HeadSettings:
    """What can be chosen where a draft has the target's output head, over some of its tokens."""

    draft_vocab_size: int = field(
        default=8192,
        metadata={
            "help": "Tokens that are drafted, the most frequent ones of the answers; 0: all",
            "least": 0,
        },
    )
    kl_weight: float = field(
        default=0.5,
        metadata={
            "help": "Share in the loss of KL(target || draft) at each token, the rest being cross entropy",
            "within": (0, 1),
        },
    )


@dataclass(frozen=True)
class SampledSettings(HeadSettings):
    """The same for what learns each row by itself."""

    num_anchors: int = field(
        default=0,
        metadata={
            "help": "Positions of each row of a batch that are learnt from, drawn anew each time; 0: all. "
            "Few of a large batch teach more than all of a small one, whose neighbours are alike",
            "least": 0,
        },
    )

    def rows(self, batch: TrainBatch, seed: int) -> torch.Tensor:
        """[batch, rows] bool: the rows to learn from; to measure on, all that are of interest."""
        _, valid = batch.future(1)
        if not self.num_anchors or not torch.is_grad_enabled():
            return valid
        return draw(valid, self.num_anchors * len(valid), batch, seed)


@dataclass(frozen=True)
class Recipe:
    """How a method is trained unless the user says otherwise.

    Attributes:
        lr: Peak learning rate of AdamW.
        warmup_share: Share of the steps over which it rises from 0.
        schedule: How it falls to 0 afterwards.
        weight_decay: AdamW's.
    """

    lr: float
    warmup_share: float = 0.1
    schedule: Literal["cosine", "linear"] = "cosine"
    weight_decay: float = 0.0


@dataclass
class TrainBatch:
    """Packed rows of documents (conversations).

    Attributes:
        token_ids: [batch, rows] int64.
        positions: [batch, rows] int64, within each document.
        documents: [batch, rows] int64, which document of its batch row a token is of; -1 at padding.
        answer: [batch, rows] bool, whether a token is one that the model answered: loss is on those only.
        hidden: For each layer of `Trainable.hidden_layers` [batch, rows, hidden], in the trunk's dtype.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor
    answer: torch.Tensor
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> TrainBatch:
        """The same on a device."""
        return TrainBatch(
            self.token_ids.to(device),
            self.positions.to(device),
            self.documents.to(device),
            self.answer.to(device),
            {layer: states.to(device) for layer, states in self.hidden.items()},
        )

    def future(self, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The token `1 + depth` after each row, and whether a draft of that depth is of interest there.

        It is where the row's next token and all up to that one are the model's answer: at

            position   0  1  2  3  4  5        depth 0: next token        valid at 1 2 3
            answer     .  .  x  x  x  .        depth 1: first drafted     valid at 1 2

        Returns:
            [batch, rows] int64, and [batch, rows] bool.
        """
        shift = 1 + depth
        tokens, valid = torch.zeros_like(self.token_ids), torch.zeros_like(self.answer)
        if shift < self.token_ids.shape[1]:
            tokens[:, :-shift] = self.token_ids[:, shift:]
            valid[:, :-shift] = self.documents[:, :-shift] == self.documents[:, shift:]
            for step in range(1, shift + 1):
                valid[:, :-shift] &= self.answer[:, step : self.answer.shape[1] - shift + step]
        return tokens, valid

    def ahead(self, layer: int, depth: int) -> torch.Tensor:
        """The state of the row that says what `future(depth)` is, of use where that is valid.

        Returns:
            [batch, rows, hidden].
        """
        return self.hidden[layer].roll(-depth, dims=1)


class Trainable(torch.nn.Module, ABC):
    """What is trained: its parameters are the trainable ones only, the trunk is not among them.

    Attributes:
        recipe: How it is trained by default.
        vocab: The tokens that it drafts; None where it is a model of its own.
        hidden_layers: The trunk's hidden states that its batches bring, as `Trunk.hidden_states` counts them;
            they are computed once and kept on disk.
    """

    recipe: Recipe
    vocab: DraftVocab | None = None
    hidden_layers: tuple[int, ...] = ()

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """The parameters as torch's optimizers take them; all learn alike unless a method says otherwise.

        Args:
            lr: The run's peak learning rate.
        """
        return [{"params": list(self.parameters()), "lr": lr}]

    @abstractmethod
    def loss(self, batch: TrainBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a batch, and what is of interest beside it: `accuracy_1`, … by depth of draft.

        Each is a mean over the batch's answers.
        """

    def forward(self, batch: TrainBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """`loss`, under the name that torch's wrappers for several devices know."""
        return self.loss(batch)

    @torch.no_grad()
    def measure(self, batches: Iterable[TrainBatch]) -> dict[str, float]:
        """Means over batches that were not trained on; what serving needs to know is measured here too."""
        sums: dict[str, float] = {}
        total = 0
        for batch in batches:
            loss, metrics = self.loss(batch)
            weight = int(batch.answer.sum())
            total += weight
            for name, value in ({"loss": loss.item()} | metrics).items():
                sums[name] = sums.get(name, 0.0) + weight * value
        return {name: value / max(1, total) for name, value in sums.items()}

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes what is served."""


class TrainableDraft(Trainable):
    """A draft: it saves config.json with `speculators_section`, and model.safetensors."""

    @abstractmethod
    def served(self) -> dict[str, torch.Tensor]:
        """What is trained, by the names in model.safetensors: the parameters themselves, or parts of them."""

    @torch.no_grad()
    def begin_with(self, weights: dict[str, torch.Tensor]) -> None:
        """Takes over trained weights.

        Args:
            weights: As `served` names them.

        Raises:
            ConfigError: They are those of another shape.
        """
        own = {name: tuple(weight.shape) for name, weight in self.served().items()}
        theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
        for name in sorted(own.keys() | theirs.keys()):
            if own.get(name) != theirs.get(name):
                raise ConfigError(
                    f"the draft to begin with was trained with other settings: {name} is "
                    f"{theirs.get(name, 'missing')} there, {own.get(name, 'not in this one')} here"
                )
        for name, weight in self.served().items():
            weight.copy_(weights[name])


def draw(valid: torch.Tensor, num: int, batch: TrainBatch, seed: int) -> torch.Tensor:
    """Some of the rows that have something to learn, at random.

    What is drawn depends on batch and seed alone, so that a resumed run draws the same.

    Args:
        valid: bool of any shape, where there is something to learn.
        num: How many; at least one, and no more than there are.
        batch: What they are of.
        seed: The run's.

    Returns:
        bool of the same shape.
    """
    generator = torch.Generator().manual_seed(seed + int(batch.token_ids.sum()))
    order = torch.rand(valid.shape, generator=generator).to(valid.device).masked_fill_(~valid, -1.0)
    best = order.flatten().topk(max(1, min(num, int(valid.sum())))).indices
    return torch.zeros_like(valid).view(-1).index_fill_(0, best, True).view_as(valid)


def available() -> list[str]:
    """Names of the methods that can be trained: the files in `training/methods`."""
    return registry.available(_PACKAGE)


def make_settings(method: str, given: dict[str, Any]) -> Any:
    """The settings of a method.

    Args:
        method: Its name.
        given: Those that are not to have their default.

    Raises:
        ConfigError: There is no such method or setting, or a value is not of its type.
    """
    kind = registry.find(_PACKAGE, method, "METHOD").Settings
    hints = typing.get_type_hints(kind)
    # JSON writes 0 for 0.0
    given = {k: float(v) if type(v) is int and hints.get(k) is float else v for k, v in given.items()}
    metadata = {f.name: f.metadata for f in dataclasses.fields(kind)}
    for name, value in given.items():
        if name not in hints:
            raise ConfigError(f"{method} has no setting {name!r}; there are: {', '.join(hints)}")
        choices = typing.get_args(hints[name])
        fits = value in choices if choices else type(value) is hints[name]
        if not fits:
            accepted = f"one of {', '.join(map(str, choices))}" if choices else hints[name].__name__
            raise ConfigError(f"{name} of {method} must be {accepted}, got {value!r}")
        least = metadata[name].get("least", 1)
        if hints[name] is int and value < least:
            raise ConfigError(f"{name} of {method} must be at least {least}, got {value}")
        low, high = metadata[name].get("within", (-math.inf, math.inf))
        if hints[name] is float and not low <= value <= high:
            raise ConfigError(f"{name} of {method} must be in [{low:g}, {high:g}], got {value}")
    return kind(**given)


def create(trunk: Trunk, run: Run, settings: Any) -> Trainable:
    """Builds the method of a run, untrained."""
    built: Trainable = registry.build(_PACKAGE, run.method, Trainable, "METHOD", trunk, run, settings)
    return built


def section(trunk: Trunk, run: Run, num_tokens: int) -> dict[str, Any]:
    """`speculators_section` of a run."""
    return speculators_section(run.method, num_tokens, run.model, trunk.config)
