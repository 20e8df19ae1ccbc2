"""What drafts by heads begin from: the target's hidden state that each sequence's last token came from."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F

from outpace.batch import Batch, TargetOutput, Verdict
from outpace.device import indices
from outpace.request import Sequence

_EPS = 1e-6  # added to the mean square


def unit_rms(x: torch.Tensor) -> torch.Tensor:
    """Each row divided by the root of its mean square: [rows, hidden] -> the same."""
    return F.rms_norm(x, x.shape[-1:], eps=_EPS)


@final
class LastHidden:
    """One state per sequence, from the step in which it first sampled. Preemption does not change it."""

    def __init__(self) -> None:
        self._states: dict[str, torch.Tensor] = {}

    def observe(self, batch: Batch, target: TargetOutput, verdict: Verdict) -> None:
        """Keeps that of the last accepted row, at which the step's last token was chosen."""
        assert target.hidden is not None, "the runner hands on the hidden states"
        ids, rows = [], []
        for entry, decision in zip(batch.entries, verdict.decisions, strict=True):
            if decision is not None:
                last = decision.path[-1] if decision.path else -1  # -1: the last known row
                ids.append(entry.sequence.id)
                rows.append(entry.first_row + entry.num_known + last)
        if rows:
            self._states.update(
                zip(ids, target.hidden[indices(rows, target.hidden.device)].unbind(), strict=True)
            )

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence."""
        self._states.pop(sequence_id, None)

    def known(self, sequences: list[Sequence], limits: list[int]) -> list[tuple[Sequence, int]]:
        """Those that may draft and have a state, with their limits."""
        pairs = zip(sequences, limits, strict=True)
        return [(sequence, limit) for sequence, limit in pairs if limit and sequence.id in self._states]

    def stack(self, sequences: list[Sequence]) -> torch.Tensor:
        """[sequences, hidden], each of unit rms, as heads are trained on them."""
        return unit_rms(torch.stack([self._states[sequence.id] for sequence in sequences]))
