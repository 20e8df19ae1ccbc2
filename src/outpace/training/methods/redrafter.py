"""A recurrent drafter (Cheng et al., "Recurrent Drafter for Fast Speculative Decoding", 2024).

From the last hidden state h, which stays the same over a draft, and a state s that takes in drafted tokens:

    s_i = SiLU(W e(g_{i-1}) + U s_{i-1} + b),   s_0 = 0,   g_0 the target's own next token
    logits_i = head(P R([h; s_i])),             R(x) = x + SiLU(A x + a), as often as `num_blocks`

with the target's embedding e and its output head, both frozen. The paper's output head of its own, 2h·vocab,
is here P (2h to h, which at first passes h on) before the target's: some hundred times less for a small one.

Trained as there on what follows, the true tokens taken in (teacher forcing). On answers of the target's own
(`outpace distill`) that is the paper's distillation, whose targets are the target's greedy continuations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from outpace.config import setting
from outpace.models.draft_checkpoint import write_draft
from outpace.models.draft_vocab import DraftVocab
from outpace.training.losses import draft_cross_entropy
from outpace.training.method import Recipe, Run, TrainableDraft, TrainBatch, VocabSettings, section
from outpace.training.trunk import Trunk


@dataclass(frozen=True)
class Settings(VocabSettings):
    """What can be chosen."""

    num_tokens: int = setting(5, "Tokens that are looked ahead, and so the greatest depth of a draft")
    num_blocks: int = setting(2, "Residual blocks R before the output head")


class ReDrafter(TrainableDraft):
    """The recurrence and what reads it."""

    recipe = Recipe(lr=1e-3)

    def __init__(self, trunk: Trunk, run: Run, settings: Settings) -> None:
        """A drafter that guesses at each depth what the target guesses for the next token."""
        super().__init__()
        self._trunk, self._run, self._settings = trunk, run, settings
        self.hidden_layers = (trunk.config.num_layers,)
        self.vocab: DraftVocab = run.draft_vocab(settings, trunk)
        self._head = self.vocab.rows(trunk.head_weight)  # [tokens, hidden]
        width = trunk.config.hidden_size
        with torch.device(trunk.device):
            self.token = torch.nn.Linear(width, width, bias=False)
            self.state = torch.nn.Linear(width, width)
            blocks = [torch.nn.Linear(2 * width, 2 * width) for _ in range(settings.num_blocks)]
            self.blocks = torch.nn.ModuleList(blocks)
            self.output = torch.nn.Linear(2 * width, width, bias=False)
            with torch.no_grad():
                for block in blocks:
                    block.weight.zero_()
                    block.bias.zero_()
                self.output.weight.copy_(torch.eye(width, 2 * width))

    def loss(self, batch: TrainBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross entropy at each depth, added up."""
        total = torch.zeros((), device=self._trunk.device)
        metrics: dict[str, float] = {}
        _, begins = batch.future(1)
        hidden = batch.hidden[self._trunk.config.num_layers][begins].float()  # [rows, hidden]
        state = torch.zeros_like(hidden)
        taken_in = batch.future(0)[0][begins]
        for depth in range(1, self._settings.num_tokens + 1):
            state = F.silu(self.token(self._trunk.embed(taken_in).float()) + self.state(state))
            targets, valid = (of_batch[begins] for of_batch in batch.future(depth))
            x = torch.cat((hidden[valid], state[valid]), dim=1)
            for block in self.blocks:
                x = x + F.silu(block(x))
            loss, right = draft_cross_entropy(self.output(x), self._head, self.vocab, targets[valid])
            count = max(1, int(valid.sum()))
            total = total + loss / count
            metrics[f"accuracy_{depth}"] = float(right.sum()) / count
            taken_in = targets
        return total, metrics

    def served(self) -> dict[str, torch.Tensor]:
        """See TrainableDraft."""
        return self.state_dict()

    def save(self, directory: Path) -> None:
        """See TrainableDraft."""
        settings = {"num_tokens": self._settings.num_tokens, "num_blocks": self._settings.num_blocks}
        dtype = self._run.save_dtype or self._trunk.dtype
        weights = {name: weight.to(dtype) for name, weight in self.served().items()}
        of_run = section(self._trunk, self._run, self._settings.num_tokens)
        write_draft(directory, of_run, settings, weights, self.vocab)


def create(trunk: Trunk, run: Run, settings: Settings) -> ReDrafter:
    """Builds an untrained drafter."""
    return ReDrafter(trunk, run, settings)
