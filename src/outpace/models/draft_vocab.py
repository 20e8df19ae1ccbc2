"""The tokens that a draft may have: the most frequent ones, so that its output head is a small one.

A head over the whole vocabulary is a fifth of a small model's pass, and most of its rows are for tokens that
hardly ever come. EAGLE-3 and FR-Spec (Zhao et al., 2025) leave those out: the target still says them, but no
draft guesses them. On disk as the `speculators` library has it: `draft_vocab_size` in config.json, and among
the weights `d2t`, int64: what to add to a token's place in the draft's vocabulary for its id.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import final

import torch

from outpace.errors import ConfigError


@final
class DraftVocab:
    """Some of the target's tokens, or all of them; a place is where a token is among them.

    Attributes:
        target_size: Tokens of the target.
        token_ids: [size] int64, rising; None where it is all of them.
    """

    def __init__(self, target_size: int, token_ids: torch.Tensor | None = None) -> None:
        """Takes token ids, which rise and are below `target_size`; None stands for all."""
        self.target_size, self.token_ids = target_size, token_ids
        self._names: list[int] = []  # `token_ids`, once they are asked for so
        self._places: torch.Tensor | None = None
        if token_ids is not None:
            self._places = torch.full((target_size,), -1, device=token_ids.device)
            self._places[token_ids] = torch.arange(len(token_ids), device=token_ids.device)

    @classmethod
    def most_frequent(cls, counts: torch.Tensor, size: int, kept: Collection[int]) -> DraftVocab:
        """The tokens that occur most; of those that occur alike the first.

        Args:
            counts: [tokens of the target] int64, how often each occurs.
            size: How many to take; 0, or as many as there are, takes all.
            kept: Tokens that are among them however rare they are, such as the end of an answer.
        """
        if not 0 < size < len(counts):
            return cls(len(counts))
        ranked = counts.clone()
        ranked[[token_id for token_id in kept if token_id < len(counts)]] = torch.iinfo(counts.dtype).max
        best = ranked.argsort(descending=True, stable=True)[:size]
        return cls(len(counts), best.sort().values)

    @classmethod
    def from_d2t(cls, d2t: torch.Tensor, target_size: int) -> DraftVocab:
        """The vocabulary that a checkpoint has.

        Args:
            d2t: [size] int64.
            target_size: Tokens of the target.

        Raises:
            ConfigError: Its tokens do not rise, or the target does not have one.
        """
        token_ids = d2t + torch.arange(len(d2t))
        if int(token_ids[0]) < 0 or int(token_ids[-1]) >= target_size or bool((token_ids.diff() < 1).any()):
            raise ConfigError(
                f"d2t of the draft must name rising token ids in [0, {target_size}), "
                f"got {int(token_ids.min())} to {int(token_ids.max())}, "
                f"{len(token_ids.unique())} different ones of {len(token_ids)}"
            )
        return cls(target_size, token_ids)

    def __len__(self) -> int:
        return self.target_size if self.token_ids is None else len(self.token_ids)

    @property
    def d2t(self) -> torch.Tensor | None:
        """[size] int64, what to add to each place for the token's id; None where that is nothing."""
        return None if self.token_ids is None else self.token_ids.cpu() - torch.arange(len(self.token_ids))

    def rows(self, head: torch.Tensor) -> torch.Tensor:
        """Of the target's output head, [tokens of the target, hidden], the rows of these tokens."""
        return head if self.token_ids is None else head[self.token_ids]

    def places(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Where tokens are among these, int64 of the same shape; -1 for those that are not."""
        return token_ids if self._places is None else self._places[token_ids]

    def ids(self, places: torch.Tensor) -> torch.Tensor:
        """Which tokens are at places, int64 of the same shape."""
        if self.token_ids is None:
            return places
        return self.token_ids.index_select(0, places.flatten()).view_as(places)

    def names(self, places: list[int]) -> list[int]:
        """The same for a few places, in plain numbers."""
        if self.token_ids is None:
            return places
        if not self._names:
            self._names = self.token_ids.tolist()
        return [self._names[place] for place in places]

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of these tokens as logits of all of the target's, -inf for others.

        Args:
            logits: [rows, size].

        Returns:
            [rows, tokens of the target].
        """
        if self.token_ids is None:
            return logits
        every = logits.new_full((len(logits), self.target_size), -torch.inf)
        return every.index_copy_(1, self.token_ids, logits)

    def coverage(self, counts: torch.Tensor) -> float:
        """The share of occurring tokens that are among these; counts as `most_frequent` takes them."""
        return float(self.rows(counts).sum() / counts.sum().clamp(min=1))
