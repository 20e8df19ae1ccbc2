"""Speculative Streaming (Bhendawade et al., 2024): streams learn the tokens behind the next one.

    lossless    α · Σ_j -log p(y_{t+1+j} | stream j of t)    adapters change stream rows, the model nothing
    shared      the same - log p(y_{t+1})                    adapters of all rows become part of the model

In shared mode α (`stream_weight`) says how much of what the adapters learn is drafting. `tuned_layers` says
which layers have them: all as in the paper, or those that streams go through, for a model that is fine-tuned
already: what it computes below them is worked out once, and an epoch takes a fraction of the time.

A share `kl_weight` of a stream's loss is the divergence from what the model itself says at y_{t+1+j}.

Streams are trained at anchors, positions that are drawn anew in each batch, as many in every row. Those of
an anchor attend to the tokens up to it and to each other, as when they are served, and to no other streams.

`shared` writes a model, and its streams into `streams` there: `outpace serve DIR --spec-method streaming
--spec-model DIR/streams`.

Streams also learn what the token before theirs tells them (`outpace.models.streams`): that of the first is
always given, as it is known whenever a draft is made; that of the others in half of the cases, chosen at
random, so that they say what may come behind any token, too.

The early exit is fitted alongside: to whether the tokens that a stream would draft come true, given the
state, where streams begin, of the token before (`outpace.models.streams`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from outpace.config import setting
from outpace.errors import ConfigError
from outpace.kernels.stream_heads import EarlyExit, exit_logits, unit
from outpace.models.convert import write_model
from outpace.models.decoder import rope_table
from outpace.models.draft_checkpoint import write_draft
from outpace.models.draft_vocab import DraftVocab
from outpace.models.streams import TARGETS, StreamConfig
from outpace.models.tokenizer import load_tokenizer
from outpace.training.losses import Teacher, draft_loss, head_loss
from outpace.training.method import HeadSettings, Recipe, Run, TrainableDraft, TrainBatch, draw, section
from outpace.training.trunk import Trunk, added_mask, document_lengths

_EXIT_EVERY = 4  # of the anchors one teaches the early exit: it is small, and their drafts cost a head each
_HIDDEN = 0.5  # of the tokens before those of the second stream on
_PIECE = 32  # anchors whose attention is computed at once: more hide more from each other, few are slow
_FIRST_EMBEDDING = 0.5  # size of the embeddings at first, against the states that they are added to
_SAMPLE = 64  # tokens whose states say how large such states are
_FIRST_EXIT = (1.0, 0.1, 0.0)  # a, s and c at first: mostly what the stream says


@dataclass(frozen=True)
class Settings(HeadSettings):
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
    token_rank: int = field(
        default=48,
        metadata={
            "help": "Rank of what the token before changes in what a stream says; 0: nothing",
            "least": 0,
        },
    )
    num_anchors: int = setting(128, "Positions of each row of a batch at which streams are trained")
    stream_weight: float = setting(0.1, "Weight of each stream's loss; that of the next token has 1")
    tuned_layers: Literal["all", "streams"] = setting(
        "all", "Layers that shared mode fine-tunes: all, or those that streams go through"
    )


@dataclass(frozen=True)
class _Piece:
    """Rows whose attention is worked out together: a document's, or the streams of some of its anchors.

    Attributes:
        rows: Where they are.
        document: Which one's tokens they may attend to. Streams also attend among themselves.
        num_tokens: How many of those, from the first on.
        seen: [seen rows] int64, the positions of the tokens, then of those streams.
        mask: [rows, seen rows], 0 or -inf, added to scores; None where each attends to those up to itself.
    """

    rows: slice
    document: int
    num_tokens: int
    seen: torch.Tensor
    mask: torch.Tensor | None = None


@dataclass
class _Rows:
    """Rows on their way through the layers: the tokens of a batch, or the streams of its anchors.

    Attributes:
        hidden: [rows, hidden], the residual stream.
        positions: [rows] int64.
        pieces: All of them in order.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    pieces: list[_Piece]

    def split(self, heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[heads, rows, head_dim] by pieces. A slice of each would have a gradient as large as all of it."""
        return torch.split(heads, [piece.rows.stop - piece.rows.start for piece in self.pieces], 1)


class Streaming(TrainableDraft):
    """Stream embeddings, adapters and early exit.

    Attributes:
        config: Their shape as they are trained; in shared mode adapters are not served.
        weights: By the names of `StreamConfig.weight_shapes`, with dashes for dots.
    """

    recipe = Recipe(lr=5e-4, schedule="linear")  # the paper's

    def __init__(self, trunk: Trunk, run: Run, settings: Settings) -> None:
        """Streams whose adapters change nothing yet.

        Raises:
            ConfigError: The settings do not fit the model.
        """
        super().__init__()
        model = trunk.config
        if not 0 < settings.layer_share < 1:
            raise ConfigError(f"layer_share of streaming must be in (0, 1), got {settings.layer_share}")
        if settings.stream_weight <= 0:
            raise ConfigError(f"stream_weight of streaming must be above 0, got {settings.stream_weight}")
        if settings.mode == "lossless" and settings.tuned_layers != "all":
            raise ConfigError(
                f"tuned_layers {settings.tuned_layers} of streaming needs mode shared, lossless tunes none"
            )
        self.config = StreamConfig(
            num_streams=settings.num_streams,
            num_stream_layers=max(1, round(settings.layer_share * model.num_layers)),
            branching=settings.branching,
            lora_rank=settings.lora_rank,
            lora_targets=TARGETS if settings.adapters == "all" else TARGETS[:4],
            exit_rank=settings.exit_rank,
            token_rank=settings.token_rank,
        )
        self._trunk, self._run, self._settings = trunk, run, settings
        self.vocab: DraftVocab = run.draft_vocab(settings, trunk)
        self._head = self.vocab.rows(trunk.head_weight)  # [tokens, hidden]
        self._is_shared = settings.mode == "shared"
        self._first = model.num_layers - self.config.num_stream_layers
        # what frozen layers make of the model's own rows is the same in every epoch
        first_tuned = 0 if settings.tuned_layers == "all" else self._first
        if not self._is_shared:
            self.hidden_layers = tuple(range(self._first, model.num_layers + 1))
        elif first_tuned:
            self.hidden_layers = (self._first,)
        if self.hidden_layers:  # there is no whole model to spoil, in lossless mode none at all
            self.recipe = Recipe(lr=3e-3 if self._is_shared else 1e-2, schedule="linear")
        shapes = self.config.weight_shapes(model)
        if self._is_shared:
            shapes |= self.config.adapter_shapes(model, first_tuned)
        generator = torch.Generator().manual_seed(run.seed)
        self._scale = _usual_size(trunk, self._first, generator)
        self.weights = torch.nn.ParameterDict(
            {
                name.replace(".", "-"): torch.nn.Parameter(
                    _first_weight(name, shape, generator, self._scale).to(trunk.device)
                )
                for name, shape in shapes.items()
            }
        )
        self._rope = rope_table(model.rope, model.head_dim, model.max_position_embeddings).to(trunk.device)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """See Trainable. Embeddings move by as much, against the states that they are added to."""
        embeddings = self.weights["embeddings"]
        others = [weight for weight in self.parameters() if weight is not embeddings]
        return [{"params": others, "lr": lr}, {"params": [embeddings], "lr": lr * self._scale}]

    def loss(self, batch: TrainBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross entropy of the streams, in shared mode of the next token, too; and the early exit's."""
        kept = batch.documents >= 0  # padding has no part in anything
        futures = [[of[kept] for of in batch.future(depth)] for depth in range(self.config.num_streams + 1)]
        with torch.set_grad_enabled(self._is_shared and torch.is_grad_enabled()):
            main = self._lower(batch)
        begun = main.hidden.detach()
        num = self._settings.num_anchors * len(batch.token_ids)
        anchors = draw(futures[1][1], num, batch, self._run.seed).nonzero().squeeze(1)  # rising
        streams = self._start(main, anchors)
        self._upper(batch, main, streams, futures[0][1])
        said = self._trunk.norm(streams.hidden).unflatten(0, (len(anchors), -1))  # [anchors, γ, hidden]
        targets, valid = (
            torch.stack([of[anchors] for of in each], 1) for each in zip(*futures[1:], strict=True)
        )
        before = torch.stack([of[anchors] for of, _ in futures[:-1]], 1)  # [anchors, γ]
        behind = self._behind(said, before)
        guess = torch.where(self._hidden(valid, batch).unsqueeze(-1), said, behind)
        loss, metrics = self._stream_loss(guess, targets, valid, self._teacher(main, anchors))
        few = slice(None, None, _EXIT_EVERY)
        loss = loss + self._exit_loss(begun, anchors[few], behind[few], targets[few], valid[few])
        if self._is_shared:
            next_loss = self._next_loss(main, *futures[0])
            loss, metrics = loss + next_loss, metrics | {"next_loss": next_loss.item()}
        return loss, metrics

    def served(self) -> dict[str, torch.Tensor]:
        """See TrainableDraft; in shared mode adapters are among them that become part of the model."""
        return {name.replace("-", "."): weight.detach() for name, weight in self.weights.items()}

    def begin_with(self, weights: dict[str, torch.Tensor]) -> None:
        """See TrainableDraft.

        In shared mode adapters begin anew: an earlier run's are part of its model. Where it had fewer streams
        the others begin as its last one, whose position they do not have; where its streams were not told the
        token before theirs (`token_rank` 0), what it tells them begins with nothing.
        """
        own = self.served()
        anew = own.keys() - self._served_config().weight_shapes(self._trunk.config)
        if "token.up.weight" not in weights:
            anew |= {name for name in own if name.startswith("token.")}
        known = weights.get("embeddings", own["embeddings"])
        more = known[-1:].expand(max(0, self.config.num_streams - len(known)), -1)
        embeddings = {"embeddings": torch.cat((known, more))}
        super().begin_with(weights | embeddings | {name: own[name] for name in anew})

    def save(self, directory: Path) -> None:
        """Writes the streams; in shared mode the fine-tuned model, and the streams in `streams` there."""
        model, config, run = self._trunk.config, self._served_config(), self._run
        dtype = run.save_dtype or self._trunk.dtype
        weights = self.served()
        if self._is_shared:
            write_model(directory, model, self._merged(weights, dtype), load_tokenizer(run.path))
            run = replace(run, model=str(directory))
            directory = directory / "streams"
        served = {name: weights[name].to(dtype) for name in config.weight_shapes(model)}
        of_run = section(self._trunk, run, config.num_streams)
        write_draft(directory, of_run, asdict(config), served, self.vocab)

    def _served_config(self) -> StreamConfig:
        """The shape of what is served: in shared mode without adapters, which become part of the model."""
        return replace(self.config, lora_rank=0, lora_targets=()) if self._is_shared else self.config

    def _merged(self, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The model's weights with the adapters in them."""
        plain = self._trunk.model.state_dict()
        merged = {name: plain[name].to(dtype) for name in self._trunk.config.weight_shapes()}
        for name, down in weights.items():
            if name.endswith("lora_A.weight"):
                part = name.removesuffix(".lora_A.weight")
                change = weights[f"{part}.lora_B.weight"] @ down
                of_model = f"model.{part}.weight"
                merged[of_model] = (plain[of_model].float() + change).to(dtype)
        return merged

    def _lower(self, batch: TrainBatch) -> _Rows:
        """The model's own rows where streams begin: known, or computed with the adapters of all layers."""
        kept, is_known = batch.documents >= 0, self._first in batch.hidden
        states = batch.hidden[self._first] if is_known else self._trunk.embed(batch.token_ids)
        lengths = document_lengths(batch.documents)
        documents = [
            slice(end - length, end) for end, length in zip(accumulate(lengths), lengths, strict=True)
        ]
        positions = batch.positions[kept]
        pieces = [_Piece(of, i, of.stop - of.start, positions[of]) for i, of in enumerate(documents)]
        main = _Rows(states[kept], positions, pieces)
        for layer in range(0 if is_known else self._first):
            self._step(layer, main)
        return main

    def _start(self, main: _Rows, anchors: torch.Tensor) -> _Rows:
        """The streams of anchors: S_j = M + P_j, at the j-th position behind M."""
        gamma, device = self.config.num_streams, anchors.device
        hidden = main.hidden[anchors].unsqueeze(1) + self.weights["embeddings"].to(main.hidden.dtype)
        ahead = torch.arange(1, gamma + 1, device=device)
        # positions beyond the model's are those of streams without a target
        most = self._trunk.config.max_position_embeddings - 1
        positions = (main.positions[anchors].unsqueeze(1) + ahead).clamp(max=most).flatten()
        streams = _Rows(hidden.flatten(0, 1), positions, [])
        places, end = anchors.tolist(), 0
        for index, document in enumerate(main.pieces):
            begin, end = end, bisect_left(places, document.rows.stop)
            for first in range(begin, end, _PIECE):
                few = slice(first, min(first + _PIECE, end))
                tokens = slice(document.rows.start, places[few.stop - 1] + 1)
                rows = slice(few.start * gamma, few.stop * gamma)
                before = torch.arange(tokens.start, tokens.stop, device=device) <= anchors[few, None]
                place = torch.arange(rows.stop - rows.start, device=device)
                among = (place // gamma == place.unsqueeze(1) // gamma) & (place <= place.unsqueeze(1))
                may_see = torch.cat((before.repeat_interleave(gamma, 0), among), 1)
                seen = torch.cat((main.positions[tokens], positions[rows]))
                mask = added_mask(may_see, hidden.dtype)
                streams.pieces.append(_Piece(rows, index, tokens.stop - tokens.start, seen, mask))
        return streams

    def _upper(self, batch: TrainBatch, main: _Rows, streams: _Rows, answers: torch.Tensor) -> None:
        """Takes streams through the layers that they go through, beside the model's own rows.

        Args:
            batch: What is learnt from.
            main: The model's own rows where streams begin.
            streams: The streams.
            answers: [rows] bool, the model's rows whose next token is its answer. Of a prompt's rows the last
                layer computes keys and values alone.
        """
        kept, last = batch.documents >= 0, self._trunk.config.num_layers - 1
        for layer in range(self._first, last + 1):
            self._step(layer, main, streams, answers if layer == last else None)
            if not self._is_shared:
                main.hidden = batch.hidden[layer + 1][kept]

    def _step(
        self, index: int, main: _Rows, streams: _Rows | None = None, answers: torch.Tensor | None = None
    ) -> None:
        """Takes rows through a layer; in lossless mode streams alone, past the model's own.

        Args:
            index: The layer.
            main: The model's own rows.
            streams: The streams.
            answers: [rows] bool, those of the model's own that are taken through; all if None.
        """
        layer = self._trunk.model.model.layers[index]
        x = layer.input_layernorm(main.hidden)
        of_main = [main.split(of) for of in self._heads("kv", index, x, main.positions, self._is_shared)]
        if self._is_shared:  # what else a frozen model computes is known
            taken = main if answers is None else _part(main, answers)
            x = x if answers is None else x[answers]
            (q,) = self._heads("q", index, x, taken.positions, True)
            mixed = [
                self._attend(index, taken, piece, of_piece, *(of[piece.document] for of in of_main))
                for piece, of_piece in zip(taken.pieces, taken.split(q), strict=True)
            ]
            done = self._finish(index, taken, torch.cat(mixed), True)
            main.hidden = done if answers is None else main.hidden.masked_scatter(answers[:, None], done)
        if streams is not None:
            x = layer.input_layernorm(streams.hidden)
            of_streams = map(streams.split, self._heads("qkv", index, x, streams.positions, True))
            mixed = []
            for piece, q, *own in zip(streams.pieces, *of_streams, strict=True):
                seen = [
                    torch.cat((tokens[piece.document][:, : piece.num_tokens], beside), 1)
                    for tokens, beside in zip(of_main, own, strict=True)
                ]
                mixed.append(self._attend(index, streams, piece, q, *seen))
            streams.hidden = self._finish(index, streams, torch.cat(mixed), True)

    def _heads(
        self, names: str, index: int, x: torch.Tensor, positions: torch.Tensor, adapted: bool
    ) -> list[torch.Tensor]:
        """Of rows the queries, keys or values that `names` has letters of.

        Returns:
            [heads, rows, head_dim] each, rotated.
        """
        attention, config = self._trunk.model.model.layers[index].self_attn, self._trunk.config
        found = []
        for name in names:
            of_name = self._linear(index, f"self_attn.{name}_proj", x, adapted)
            of_name = of_name.unflatten(1, (-1, config.head_dim))
            if name != "v":
                if config.qk_norm:
                    of_name = attention.get_submodule(f"{name}_norm")(of_name)
                of_name = self._rotate(of_name, positions)
            found.append(of_name.transpose(0, 1))
        return found

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self._rope[positions].unsqueeze(1).chunk(2, dim=-1)
        left, right = x.float().chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)

    def _attend(
        self, index: int, rows: _Rows, piece: _Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """What the rows of a piece take in.

        Args:
            index: The layer.
            rows: Of which it is a piece.
            piece: The piece.
            q: [heads, rows of the piece, head_dim].
            k: [key heads, seen rows, head_dim], of what the piece sees.
            v: The same.

        Returns:
            [rows of the piece, heads * head_dim].
        """
        config, mask = self._trunk.config, piece.mask
        window = config.sliding_windows[index] if config.sliding_windows else None
        if window is not None:
            distance = rows.positions[piece.rows].unsqueeze(1) - piece.seen
            inside = added_mask((distance >= 0) & (distance < window), q.dtype)
            mask = inside if mask is None else inside + mask
        # repeated here and not by torch, whose fast kernels take a mask or fewer key heads but not both
        k, v = (x.repeat_interleave(config.num_heads // config.num_kv_heads, 0)[None] for x in (k, v))
        mixed = F.scaled_dot_product_attention(q[None], k, v, attn_mask=mask, is_causal=mask is None)
        return mixed[0].transpose(0, 1).flatten(1)

    def _finish(self, index: int, rows: _Rows, mixed: torch.Tensor, adapted: bool) -> torch.Tensor:
        """What follows attention in a layer: the residual stream behind it.

        Args:
            index: The layer.
            rows: What goes through it.
            mixed: [rows, heads * head_dim], what they took in.
            adapted: Whether adapters apply.
        """
        layer = self._trunk.model.model.layers[index]
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

    def _behind(self, said: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """What streams say behind given tokens.

        Args:
            said: [anchors, γ, hidden], what they say behind any.
            before: [anchors, γ] int64.
        """
        if not self.config.token_rank:
            return said
        weights = self._named("token")
        of_said, of_before = (
            F.linear(unit(x), weights[f"token.{name}.weight"])
            for name, x in (("said", said), ("before", self._trunk.embed(before)))
        )
        return said + F.linear(F.silu(of_said + of_before), weights["token.up.weight"]).to(said.dtype)

    def _hidden(self, valid: torch.Tensor, batch: TrainBatch) -> torch.Tensor:
        """Which streams are not told the token before, bool like `valid`; to measure on, none."""
        hidden = torch.zeros_like(valid)
        if torch.is_grad_enabled():
            generator = torch.Generator().manual_seed(self._run.seed + int(batch.token_ids.sum()))
            drawn = torch.rand(valid.shape, generator=generator) < _HIDDEN
            hidden[:, 1:] = drawn[:, 1:].to(valid.device)
        return hidden

    def _named(self, kind: str) -> dict[str, torch.Tensor]:
        """The weights KIND.*, by the names of `StreamConfig.weight_shapes`."""
        return {name.replace("-", "."): w for name, w in self.weights.items() if name.startswith(f"{kind}-")}

    def _teacher(self, main: _Rows, anchors: torch.Tensor) -> Teacher:
        """What the model says where streams guess; in shared mode it is not taught by them.

        Args:
            main: The model's own rows behind the last layer, in lossless mode behind the final norm, too.
            anchors: [anchors] int64.
        """
        ahead = torch.arange(1, self.config.num_streams + 1, device=anchors.device)
        rows = (anchors.unsqueeze(1) + ahead).clamp(max=len(main.hidden) - 1)  # [anchors, γ]
        hidden = main.hidden.detach()[rows.flatten()]
        hidden = self._trunk.norm(hidden) if self._is_shared else hidden
        return Teacher(hidden, self._head, self._settings.kl_weight)

    def _stream_loss(
        self, said: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, teacher: Teacher
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """α · Σ_j of the mean loss of stream j, and how often each is right."""
        counts = valid.sum(dim=0).clamp(min=1)  # [γ]
        weights = self._settings.stream_weight * valid / counts
        loss, right = draft_loss(
            said.flatten(0, 1), self._head, self.vocab, targets.flatten(), weights.flatten(), teacher
        )
        right = right.view_as(valid) & valid
        accuracies = (right.sum(dim=0) / counts).tolist()
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
            begun: [rows, hidden], the residual stream where streams begin.
            anchors: [anchors] int64.
            said: [anchors, γ, hidden], what their streams say.
            targets: [anchors, γ] int64.
            valid: The same, bool.
        """
        with torch.no_grad():
            # of plain rows: torch would copy the head for each anchor
            logits = F.linear(said.flatten(0, 1), self._head).view(*said.shape[:2], -1)
            probs = logits.float().softmax(-1)
            q, places = probs.topk(self.config.branching)  # [anchors, γ, branching]
            came = (places == self.vocab.places(targets).unsqueeze(-1)).float()
            ahead = torch.arange(1, said.shape[1] + 1, device=anchors.device)
            parents = (anchors.unsqueeze(1) + ahead).clamp(max=len(begun) - 1)  # [anchors, γ]
            x = self._trunk.norm(begun[parents]).unsqueeze(2)
        weights = self._named("exit")
        down, up = weights["exit.down.weight"], weights["exit.up.weight"].T
        early_exit = EarlyExit(down, up, weights["exit.bias.weight"], weights["exit.scalars"], self._head)
        logits = exit_logits(early_exit, x, places, q)
        losses = F.binary_cross_entropy_with_logits(logits, came, reduction="none").mean(-1)
        loss: torch.Tensor = (losses * valid).sum() / valid.sum().clamp(min=1)
        return self._settings.stream_weight * loss

    def _next_loss(self, main: _Rows, targets: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of the next token."""
        hidden = self._trunk.norm(main.hidden[valid])
        return head_loss(hidden, self._trunk.head_weight, targets[valid]).loss / max(1, len(hidden))


def _part(rows: _Rows, kept: torch.Tensor) -> _Rows:
    """Some of a model's own rows ([rows] bool), which attend to all of their documents up to themselves."""
    part, end = _Rows(rows.hidden[kept], rows.positions[kept], []), 0
    for document in rows.pieces:
        begin, end = end, end + int(kept[document.rows].sum())
        may_see = document.seen <= part.positions[begin:end, None]
        mask = added_mask(may_see, rows.hidden.dtype)
        part.pieces.append(replace(document, rows=slice(begin, end), mask=mask))
    return part


@torch.no_grad()
def _usual_size(trunk: Trunk, layer: int, generator: torch.Generator) -> float:
    """The median rms of states behind so many layers, of random tokens: the first one's are huge."""
    token_ids = torch.randint(trunk.config.vocab_size, (1, _SAMPLE), generator=generator).to(trunk.device)
    positions = torch.arange(_SAMPLE, device=trunk.device).unsqueeze(0)
    states = trunk.hidden_states(token_ids, positions, torch.zeros_like(token_ids), (layer,))[layer]
    return float(states.float().square().mean(-1).sqrt().median())


def _first_weight(
    name: str, shape: tuple[int, ...], generator: torch.Generator, scale: float
) -> torch.Tensor:
    """Noise where it is needed, else zeros, with which adapters and early exit change nothing."""
    if name == "exit.scalars":
        return torch.tensor(_FIRST_EXIT)
    if name == "embeddings":
        return _FIRST_EMBEDDING * scale * torch.randn(shape, generator=generator)
    if name.endswith(("lora_A.weight", "down.weight", "said.weight", "before.weight")):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[1])
    return torch.zeros(shape)


def create(trunk: Trunk, run: Run, settings: Settings) -> Streaming:
    """Builds untrained streams."""
    return Streaming(trunk, run, settings)
