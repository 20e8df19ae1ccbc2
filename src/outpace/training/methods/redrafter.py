"""A recurrent drafter (Cheng et al., "Recurrent Drafter for Fast Speculative Decoding", 2024).

From the last hidden state h, which stays the same over a draft, and a state s that takes in drafted tokens:

    s_i = SiLU(W n(e(g_{i-1})) + U s_{i-1} + b),   s_0 = 0,   g_0 the target's own next token
    logits_i = head(P R([n(h); s_i])),             R(x) = x + SiLU(A x + a), as often as `num_blocks`

with the target's embedding e and its output head, both frozen, and n(x) = x / rms(x): an embedding may be ten
times smaller than a hidden state, and would be learnt from as much more slowly. The paper's output head of
its own, 2h·vocab, is here P (2h to h, which at first passes h on) before the target's: some hundred times
less for a small one.

Trained as there on what follows, the true tokens taken in (teacher forcing): on answers of the target's own
(`outpace distill`) that is the paper's distillation, whose targets are the target's greedy continuations. A
share `kl_weight` of the loss is the divergence from the target's whole distribution at each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from outpace.config import setting
from outpace.models.draft_checkpoint import write_draft
from outpace.models.draft_vocab import DraftVocab
from outpace.spec.last_hidden import unit_rms
from outpace.training.losses import Teacher, draft_loss
from outpace.training.method import Recipe, Run, SampledSettings, TrainableDraft, TrainBatch, section
from outpace.training.trunk import Trunk


@dataclass(frozen=True)
class Settings(SampledSettings):
    """What can be chosen."""

    num_tokens: int = setting(5, "Tokens that are looked ahead, and so the greatest depth of a draft")
    num_blocks: int = setting(1, "Residual blocks R before the output head")


class ReDrafter(TrainableDraft):
    """The recurrence and what reads it."""

    recipe = Recipe(lr=2e-3)

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
        """Cross entropy and divergence from the target at each depth, added up."""
        total = torch.zeros((), device=self._trunk.device)
        metrics: dict[str, float] = {}
        begins = self._settings.rows(batch, self._run.seed)
        last = self._trunk.config.num_layers
        hidden = unit_rms(batch.hidden[last][begins].float())  # [rows, hidden]
        state = torch.zeros_like(hidden)
        taken_in = batch.future(0)[0][begins]
        for depth in range(1, self._settings.num_tokens + 1):
            embedded = unit_rms(self._trunk.embed(taken_in).float())
            state = F.silu(self.token(embedded) + self.state(state))
            targets, valid = (of_batch[begins] for of_batch in batch.future(depth))
            x = torch.cat((hidden[valid], state[valid]), dim=1)
            for block in self.blocks:
                x = x + F.silu(block(x))
            teacher = Teacher(batch.ahead(last, depth)[begins][valid], self._head, self._settings.kl_weight)
            loss, right = draft_loss(self.output(x), self._head, self.vocab, targets[valid], teacher=teacher)
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
