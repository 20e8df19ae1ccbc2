"""Speculative Streaming (Bhendawade et al., 2024): streams learn the tokens behind the next one.

    lossless    0.1 · Σ_j -log p(y_{t+1+j} | stream j of t)    adapters change stream rows, the model nothing
    shared      the same - log p(y_{t+1})                      adapters of all rows become part of the model

Streams are trained at anchors, positions that are drawn anew in each batch, as many in every row. Those of
an anchor attend to the tokens up to it and to each other, as when they are served, and to no other streams.

`shared` writes a model, and its streams into `streams` there: `outpace serve DIR --spec-method streaming
--spec-model DIR/streams`.

The early exit is fitted alongside: to whether the tokens that a stream would draft come true, given the
state, where streams begin, of the token before (`outpace.models.streams`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from outpace.config import setting
from outpace.errors import ConfigError
from outpace.models.convert import write_model
from outpace.models.decoder import rope_table
from outpace.models.draft_checkpoint import write_draft
from outpace.models.streams import TARGETS, StreamConfig, exit_logits
from outpace.models.tokenizer import load_tokenizer
from outpace.training.losses import head_cross_entropy
from outpace.training.method import Recipe, Run, TrainableDraft, TrainBatch, section
from outpace.training.trunk import Trunk, document_mask

_STREAM_WEIGHT = 0.1  # α_j of the paper: each stream's loss against that of the next token
_EXIT_EVERY = (
    4  # of the anchors the early exit learns from one: it is small, and their drafts cost a head each
)
_FIRST_EMBEDDING = 0.02  # size of the embeddings at first
_FIRST_EXIT = (1.0, 0.1, 0.0)  # a, s and c at first: mostly what the stream says


@dataclass(frozen=True)
class Settings:
    """What can be chosen."""

    mode: Literal["lossless", "shared"] = setting(
        "lossless", "Whether the model stays as it is, or is fine-tuned along and written beside the streams"
    )
    num_streams: int = setting(4, "Streams, and so the greatest depth of a draft")
    layer_share: float = setting(0.25, "Share of the layers, the last ones, that streams go through")
    lora_rank: int = setting(32, "Rank of the adapters; even")
    adapters: Literal["attention", "all"] = setting("attention", "Linear layers that have an adapter")
    branching: int = setting(4, "Most tokens of a stream in a draft")
    exit_rank: int = setting(8, "Rank of the early exit; even")
    num_anchors: int = setting(128, "Positions of each row of a batch at which streams are trained")


@dataclass
class _Rows:
    """Rows on their way through the layers: the tokens of a batch, or the streams of its anchors.

    Attributes:
        hidden: [batch, rows, hidden], the residual stream.
        positions: [batch, rows] int64.
        mask: [batch, 1, rows, seen rows] bool; streams see the batch's tokens, then streams.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor


class Streaming(TrainableDraft):
    """Stream embeddings, adapters and early exit.

    Attributes:
        config: Their shape as they are trained; in shared mode adapters are not served.
        weights: By the names of `StreamConfig.weight_shapes`, with dashes for dots.
    """

    recipe = Recipe(lr=5e-4, schedule="linear")

    def __init__(self, trunk: Trunk, run: Run, settings: Settings) -> None:
        """Streams whose adapters change nothing yet.

        Raises:
            ConfigError: The settings do not fit the model.
        """
        super().__init__()
        model = trunk.config
        if not 0 < settings.layer_share < 1:
            raise ConfigError(f"layer_share of streaming must be in (0, 1), got {settings.layer_share}")
        self.config = StreamConfig(
            num_streams=settings.num_streams,
            num_stream_layers=max(1, round(settings.layer_share * model.num_layers)),
            branching=settings.branching,
            lora_rank=settings.lora_rank,
            lora_targets=TARGETS if settings.adapters == "all" else TARGETS[:4],
            exit_rank=settings.exit_rank,
        )
        self._trunk, self._run, self._settings = trunk, run, settings
        self._is_shared = settings.mode == "shared"
        self._first = model.num_layers - self.config.num_stream_layers
        self.hidden_layers = () if self._is_shared else (self._first,)
        shapes = self.config.weight_shapes(model)
        if self._is_shared:
            shapes |= self.config.adapter_shapes(model, 0)
        generator = torch.Generator().manual_seed(run.seed)
        self.weights = torch.nn.ParameterDict(
            {
                name.replace(".", "-"): torch.nn.Parameter(
                    _first_weight(name, shape, generator).to(trunk.device)
                )
                for name, shape in shapes.items()
            }
        )
        self._rope = rope_table(model.rope, model.head_dim, model.max_position_embeddings).to(trunk.device)

    def loss(self, batch: TrainBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross entropy of the streams, in shared mode of the next token, too; and the early exit's."""
        mask = document_mask(batch.positions, batch.documents)
        with torch.set_grad_enabled(self._is_shared and torch.is_grad_enabled()):
            main = _Rows(self._lower(batch, mask), batch.positions, mask)
        begun = main.hidden.detach()
        anchors = self._anchors(batch)
        streams = self._start(main, anchors)
        for layer in range(self._first, self._trunk.config.num_layers):
            self._step(layer, main, streams)
        said = self._trunk.norm(streams.hidden).unflatten(1, (anchors.shape[1], -1))  # [batch, anchors, γ, h]
        targets, valid = self._targets(batch, anchors)
        loss, metrics = self._stream_loss(said, targets, valid)
        picked = slice(None, None, _EXIT_EVERY)
        loss = loss + self._exit_loss(
            begun, anchors[:, picked], *(t[:, picked] for t in (said, targets, valid))
        )
        if self._is_shared:
            next_loss = self._next_loss(batch, main)
            loss, metrics = loss + next_loss, metrics | {"next_loss": next_loss.item()}
        return loss, metrics

    def save(self, directory: Path) -> None:
        """Writes the streams; in shared mode the fine-tuned model, and the streams in `streams` there."""
        model, dtype = self._trunk.config, self._trunk.dtype
        config, run = self.config, self._run
        weights = {name.replace("-", "."): weight.detach() for name, weight in self.weights.items()}
        if self._is_shared:
            write_model(directory, model, self._merged(weights), load_tokenizer(run.path))
            config, run = replace(config, lora_rank=0, lora_targets=()), replace(run, model=str(directory))
            directory = directory / "streams"
        served = {name: weights[name].to(dtype) for name in config.weight_shapes(model)}
        write_draft(directory, section(self._trunk, run, config.num_streams), asdict(config), served)

    def _merged(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's weights with the adapters in them."""
        plain = self._trunk.model.state_dict()
        merged = {name: plain[name] for name in self._trunk.config.weight_shapes()}
        for name, down in weights.items():
            if name.endswith("lora_A.weight"):
                part = name.removesuffix(".lora_A.weight")
                change = weights[f"{part}.lora_B.weight"] @ down
                of_model = f"model.{part}.weight"
                merged[of_model] = (merged[of_model].float() + change).to(self._trunk.dtype)
        return merged

    def _lower(self, batch: TrainBatch, mask: torch.Tensor) -> torch.Tensor:
        """The residual stream where streams begin: computed before, or in shared mode with the adapters."""
        if not self._is_shared:
            return batch.hidden[self._first]
        main = _Rows(self._trunk.embed(batch.token_ids), batch.positions, mask)
        for layer in range(self._first):
            self._step(layer, main)
        return main.hidden

    def _anchors(self, batch: TrainBatch) -> torch.Tensor:
        """[batch, anchors] int64: rows where streams have something to learn, drawn at random.

        What is drawn depends on the batch and the seed alone, so that a resumed run draws the same.
        """
        _, valid = batch.future(1)
        num = max(1, min(self._settings.num_anchors, int(valid.sum(dim=1).max())))
        generator = torch.Generator().manual_seed(self._run.seed + int(batch.token_ids.sum()))
        order = torch.rand(valid.shape, generator=generator).to(valid.device)
        return order.masked_fill(~valid, -1.0).topk(num, dim=1).indices

    def _targets(self, batch: TrainBatch, anchors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each stream of each anchor its token, and whether there is one: [batch, anchors, γ] both."""
        futures = [batch.future(j + 1) for j in range(self.config.num_streams)]
        targets, valid = (
            torch.stack([of.gather(1, anchors) for of in each], 2) for each in zip(*futures, strict=True)
        )
        return targets, valid

    def _start(self, main: _Rows, anchors: torch.Tensor) -> _Rows:
        """The streams of anchors: S_j = M + P_j, at the j-th position behind M."""
        gamma = self.config.num_streams
        embeddings = self.weights["embeddings"].to(main.hidden.dtype)
        at = anchors.unsqueeze(2)
        hidden = main.hidden.gather(1, at.expand(-1, -1, main.hidden.shape[2])).unsqueeze(2) + embeddings
        ahead = torch.arange(1, gamma + 1, device=anchors.device)
        # positions beyond the model's are those of streams without a target
        most = self._trunk.config.max_position_embeddings - 1
        positions = (main.positions.gather(1, anchors).unsqueeze(2) + ahead).clamp(max=most)
        tokens = main.mask[:, 0].gather(1, at.expand(-1, -1, main.mask.shape[3])).repeat_interleave(gamma, 1)
        before = torch.ones(gamma, gamma, dtype=torch.bool, device=anchors.device).tril()
        own = torch.block_diag(*[before] * anchors.shape[1]).expand(len(anchors), -1, -1)
        return _Rows(hidden.flatten(1, 2), positions.flatten(1), torch.cat((tokens, own), 2).unsqueeze(1))

    def _step(self, index: int, main: _Rows, streams: _Rows | None = None) -> None:
        """Takes rows through a layer."""
        layer = self._trunk.model.model.layers[index]
        with torch.set_grad_enabled(self._is_shared and torch.is_grad_enabled()):
            q, k, v = self._heads(index, layer.input_layernorm(main.hidden), main.positions, self._is_shared)
            seen = main.positions
            is_last = index + 1 == self._trunk.config.num_layers
            if self._is_shared or not is_last:  # a frozen model's own logits train nothing
                main.hidden = self._finish(index, main, q, k, v, seen, self._is_shared)
        if streams is not None:
            x = layer.input_layernorm(streams.hidden)
            q, own_k, own_v = self._heads(index, x, streams.positions, True)
            k, v = torch.cat((k, own_k), 2), torch.cat((v, own_v), 2)
            seen = torch.cat((seen, streams.positions), 1)
            streams.hidden = self._finish(index, streams, q, k, v, seen, True)

    def _heads(
        self, index: int, x: torch.Tensor, positions: torch.Tensor, adapted: bool
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, [batch, heads, rows, head_dim] each, rotated."""
        attention = self._trunk.model.model.layers[index].self_attn
        q, k, v = (
            self._linear(index, f"self_attn.{name}_proj", x, adapted).unflatten(
                2, (-1, self._trunk.config.head_dim)
            )
            for name in "qkv"
        )
        if self._trunk.config.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        return (
            self._rotate(q, positions).transpose(1, 2),
            self._rotate(k, positions).transpose(1, 2),
            v.transpose(1, 2),
        )

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self._rope[positions].unsqueeze(2).chunk(2, dim=-1)
        left, right = x.float().chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)

    def _finish(
        self,
        index: int,
        rows: _Rows,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seen: torch.Tensor,
        adapted: bool,
    ) -> torch.Tensor:
        """Attention over rows at positions `seen`, then the MLP."""
        config, layer, mask = self._trunk.config, self._trunk.model.model.layers[index], rows.mask
        window = config.sliding_windows[index] if config.sliding_windows else None
        if window is not None:
            mask = mask & (rows.positions[:, None, :, None] - seen[:, None, None, :] < window)
        # repeated here and not by torch, whose fast kernels take a mask or fewer key heads but not both
        k, v = (of.repeat_interleave(config.num_heads // config.num_kv_heads, 1) for of in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        hidden = rows.hidden + self._linear(index, "self_attn.o_proj", mixed, adapted)
        x = layer.post_attention_layernorm(hidden)
        gate, up = (self._linear(index, f"mlp.{name}_proj", x, adapted) for name in ("gate", "up"))
        return hidden + self._linear(index, "mlp.down_proj", F.silu(gate) * up, adapted)

    def _linear(self, index: int, part: str, x: torch.Tensor, adapted: bool) -> torch.Tensor:
        """A linear layer of the trunk, with its adapter."""
        y: torch.Tensor = self._trunk.model.model.layers[index].get_submodule(part)(x)
        name = f"layers-{index}-{part.replace('.', '-')}-lora_"
        if not adapted or f"{name}A-weight" not in self.weights:
            return y
        down, up = (self.weights[f"{name}{side}-weight"].to(x.dtype) for side in "AB")
        return y + F.linear(F.linear(x, down), up)

    def _stream_loss(
        self, said: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """0.1 · Σ_j of the mean cross entropy of stream j, and how often each is right."""
        counts = valid.sum(dim=(0, 1)).clamp(min=1)  # [γ]
        weights = _STREAM_WEIGHT * valid / counts
        head = self._trunk.head_weight
        loss, best = head_cross_entropy(said.flatten(0, 2), head, targets.flatten(), weights.flatten())
        right = (best.view_as(targets) == targets) & valid
        accuracies = (right.sum(dim=(0, 1)) / counts).tolist()
        return loss, {f"accuracy_{depth}": value for depth, value in enumerate(accuracies, 1)}

    def _exit_loss(
        self,
        begun: torch.Tensor,
        anchors: torch.Tensor,
        said: torch.Tensor,
        targets: torch.Tensor,
        valid: torch.Tensor,
    ) -> torch.Tensor:
        """How wrong the early exit is about the tokens that these streams would draft; trains nothing else.

        Args:
            begun: [batch, rows, hidden], the residual stream where streams begin.
            anchors: [batch, anchors] int64.
            said: [batch, anchors, γ, hidden], what their streams say.
            targets: [batch, anchors, γ] int64.
            valid: The same, bool.
        """
        with torch.no_grad():
            probs = self._trunk.head(said).float().softmax(-1)
            q, token_ids = probs.topk(self.config.branching)  # [batch, anchors, γ, branching]
            came = (token_ids == targets.unsqueeze(-1)).float()
            ahead = torch.arange(1, said.shape[2] + 1, device=anchors.device)
            parents = (anchors.unsqueeze(2) + ahead).clamp(max=begun.shape[1] - 1).flatten(1)
            states = begun.gather(1, parents.unsqueeze(2).expand(-1, -1, begun.shape[2]))
            x = self._trunk.norm(states).view_as(said).unsqueeze(3)
        weights = {name.replace("-", "."): w for name, w in self.weights.items() if name.startswith("exit-")}
        logits = exit_logits(weights, x, self._trunk.head_weight[token_ids], q)
        losses = F.binary_cross_entropy_with_logits(logits, came, reduction="none").mean(-1)
        loss: torch.Tensor = (losses * valid).sum() / valid.sum().clamp(min=1)
        return _STREAM_WEIGHT * loss

    def _next_loss(self, batch: TrainBatch, main: _Rows) -> torch.Tensor:
        """Mean cross entropy of the next token."""
        targets, valid = batch.future(0)
        hidden = self._trunk.norm(main.hidden[valid])
        loss, _ = head_cross_entropy(hidden, self._trunk.head_weight, targets[valid])
        return loss / max(1, len(hidden))


def _first_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Noise where it is needed, else zeros, with which adapters and early exit change nothing."""
    if name == "exit.scalars":
        return torch.tensor(_FIRST_EXIT)
    if name == "embeddings":
        return _FIRST_EMBEDDING * torch.randn(shape, generator=generator)
    if name.endswith(("lora_A.weight", "down.weight")):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[1])
    return torch.zeros(shape)


def create(trunk: Trunk, run: Run, settings: Settings) -> Streaming:
    """Builds untrained streams."""
    return Streaming(trunk, run, settings)
