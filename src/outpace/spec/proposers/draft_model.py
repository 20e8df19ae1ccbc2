"""Drafts by a smaller model of the same vocabulary.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023. The model has a cache of
its own with room for as many tokens as the target's, and computes what it has not seen yet when it is next
asked: a prompt at its sequence's first draft, the target's own token after each verification, everything
since the last draft where a policy had allowed none.

Any model of the target's vocabulary will do. One that `outpace train draft_model` made has layers of its own
between the embedding and the head of its target, which are in memory once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outpace.errors import ConfigError
from outpace.kernels import load_kernels
from outpace.models.config import ModelConfig
from outpace.models.decoder import Decoder
from outpace.models.draft_checkpoint import Shapes, embedding_checksum, read_draft
from outpace.models.draft_vocab import DraftVocab
from outpace.models.hub import resolve_model
from outpace.models.loader import is_gguf, load_config, load_weights, read_json
from outpace.models.tokenizer import load_tokenizer
from outpace.request import Sequence
from outpace.runtime.kv_cache import KVCache
from outpace.spec.drafter import Drafter
from outpace.spec.proposer import DraftContext, Proposer
from outpace.tree import EMPTY_TREE, DraftTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_EMBEDDING = "embedding_sha256"  # the setting that says whose embedding is shared


@dataclass(slots=True, eq=False)
class _Shadow:
    """A sequence of the target and the draft model's progress on it.

    Attributes:
        target: The target's.
        draft: The same request with blocks of the draft's cache; drafted tokens follow the known ones.
        num_agreed: Tokens from the start that were compared and are the same in both.
    """

    target: Sequence
    draft: Sequence
    num_agreed: int = 0

    def catch_up(self) -> None:
        """Takes over the target's tokens. Of the drafted ones those that came true stay computed."""
        known, tokens = self.target.token_ids, self.draft.token_ids
        agreed = self.num_agreed
        while agreed < min(len(known), len(tokens)) and known[agreed] == tokens[agreed]:
            agreed += 1
        tokens[agreed:] = known[agreed:]
        # The last one is always computed anew: its logits are wanted.
        self.draft.num_computed = min(self.draft.num_computed, agreed, len(known) - 1)
        self.num_agreed = len(known)


class DraftModel(Proposer):
    """Keeps a shadow of each sequence it has drafted for.

    Attributes:
        drafter: Who drafts, and the cache.
    """

    def __init__(self, drafter: Drafter) -> None:
        """Starts without sequences.

        Args:
            drafter: Over a cache that is the draft model's alone.
        """
        self.drafter, self._blocks = drafter, drafter.kv.blocks
        self._shadows: dict[str, _Shadow] = {}

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """See Proposer."""
        wanted = [(s, limit) for s, limit in zip(sequences, limits, strict=True) if limit]
        if not wanted:
            return [EMPTY_TREE] * len(sequences)
        self._release_preempted()
        drafts = self.drafter.draft([self._caught_up(s) for s, _ in wanted], [limit for _, limit in wanted])
        trees = iter(drafts)
        return [next(trees) if limit else EMPTY_TREE for limit in limits]

    def release(self, sequence_id: str) -> None:
        """Gives its blocks back; the next turn of a conversation finds them by their prefix."""
        if shadow := self._shadows.pop(sequence_id, None):
            self._follow(shadow)
            self._blocks.free(shadow.draft)

    def reset_prefix_cache(self) -> None:
        """See Proposer."""
        self._blocks.reset_prefix_cache()

    def _release_preempted(self) -> None:
        """What the target has no room for waits without blocks here too."""
        for sequence_id in [s.target.id for s in self._shadows.values() if not s.target.block_ids]:
            self.release(sequence_id)

    def _caught_up(self, sequence: Sequence) -> Sequence:
        shadow = self._shadows.get(sequence.id)
        if shadow is None:
            shadow = self._shadows[sequence.id] = _Shadow(sequence, Sequence.start(sequence.request))
        self._follow(shadow)
        if not shadow.draft.block_ids:
            self._blocks.match(shadow.draft)
        return shadow.draft

    def _follow(self, shadow: _Shadow) -> None:
        """Brings a shadow up to date: rejected drafts lose their blocks, accepted ones can be shared."""
        shadow.catch_up()
        self._blocks.trim(shadow.draft)
        self._blocks.register(shadow.draft)


def check_vocabulary(
    target_size: int, draft_size: int, target: PreTrainedTokenizerFast, draft: PreTrainedTokenizerFast
) -> None:
    """Makes sure that a token means the same to both models.

    Args:
        target_size: Rows of the target's embedding.
        draft_size: Rows of the draft model's.
        target: Tokenizer of the target.
        draft: Tokenizer of the draft model.

    Raises:
        ConfigError: The sizes differ, or a token does.
    """
    advice = "a draft model must have the target's vocabulary: choose a smaller one of the same family"
    if target_size != draft_size:
        raise ConfigError(f"the target has {target_size} tokens, the draft model {draft_size}; {advice}")
    names = {token_id: token for token, token_id in draft.get_vocab().items()}
    for token, token_id in sorted(target.get_vocab().items(), key=lambda item: item[1]):
        # ids that only one of the two names are padding of the other
        if names.get(token_id, token) != token:
            raise ConfigError(
                f"token {token_id} is {token!r} for the target and {names[token_id]!r} for the draft model; "
                f"{advice}"
            )


def create(context: DraftContext) -> DraftModel:
    """Loads the model that `model` names.

    Raises:
        ConfigError: It cannot be had, its vocabulary is not the target's, or it was trained for another one.
    """
    settings = context.speculative
    path = resolve_model(settings.model)
    decoder, vocab = _trained(path, context) if _is_trained(path) else (_whole(path, context), None)
    # As many tokens as the target's: `choose_num_blocks` has planned both.
    num_blocks, has_prefixes = context.kv.blocks.num_blocks, context.config.enable_prefix_caching
    kv = KVCache.of(decoder, num_blocks, has_prefixes)
    logger.info("draft model %s of %d layers", settings.model, decoder.config.num_layers)
    runner, max_rows = context.runner.beside(decoder, kv), context.config.max_num_batched_tokens
    return DraftModel(Drafter(runner, kv, settings.draft_branching or 1, max_rows, vocab))


def _is_trained(path: Path) -> bool:
    """Whether a directory holds layers between the ends of a target, not a model of its own."""
    settings = {} if is_gguf(path) else read_json(path / "config.json").get("draft_model")
    return isinstance(settings, dict) and _EMBEDDING in settings


def _trained(path: Path, context: DraftContext) -> tuple[Decoder, DraftVocab]:
    target = context.decoder

    def own(settings: dict[str, Any]) -> ModelConfig:
        windows = context.model.sliding_windows[: settings["num_layers"]]
        return replace(context.model, num_layers=settings["num_layers"], sliding_windows=windows)

    def shapes(settings: dict[str, Any], num_tokens: int) -> Shapes:
        return own(settings).own_weight_shapes()

    keys = {"num_layers": int, _EMBEDDING: str}
    draft = read_draft(str(path), "draft_model", context.model, shapes, target.dtype, keys, target.device)
    if draft.settings[_EMBEDDING] != embedding_checksum(target.embedding):
        raise ConfigError(
            f"{path} shares the embedding of the target it was trained for, and this target has another: "
            "train one for it with outpace train draft_model"
        )
    return target.with_layers(own(draft.settings), draft.weights, draft.vocab), draft.vocab


def _whole(path: Path, context: DraftContext) -> Decoder:
    target, config = context.decoder, load_config(path)
    check_vocabulary(target.config.vocab_size, config.vocab_size, context.tokenizer, load_tokenizer(path))
    kernels = load_kernels(
        context.config.kernels,
        target.dtype,
        head_dim=config.head_dim,
        widths=(config.hidden_size, config.intermediate_size),
        num_threads=context.config.threads_per_rank,
        device=target.device,
        batch_invariant=context.config.batch_invariant,
    )
    weights = load_weights(path, config, target.dtype, target.device)
    return Decoder(config, weights, target.dtype, kernels)
