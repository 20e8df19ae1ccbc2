"""Losses over a large vocabulary without keeping its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from outpace.models.draft_vocab import DraftVocab

_CHUNK_LOGITS = 1 << 22  # values of logits that are there at once: about what a cache holds


class Teacher(NamedTuple):
    """Whose whole distribution is learnt beside the token that came (Hinton et al., 2015).

    Attributes:
        hidden: [rows, hidden], what its head is given where the learner guesses.
        head: [vocab, hidden], not trained.
        weight: Share of KL(teacher || learner) in the loss, in [0, 1]; the rest is the cross entropy's.
    """

    hidden: torch.Tensor
    head: torch.Tensor
    weight: float


class HeadLoss(NamedTuple):
    """What `head_loss` gives.

    Attributes:
        loss: float32, the weighted sum over rows.
        best: [rows] int64, the most probable token of each.
    """

    loss: torch.Tensor
    best: torch.Tensor


class _HeadLoss(torch.autograd.Function):
    """Sums weighted losses, with the gradients worked out chunk by chunk on the way forward.

    The gradient of one row's loss with regard to its logits is q - (1 - w)·onehot - w·p, with q the
    learner's and p the teacher's distribution and w the teacher's weight; it is used at once and forgotten,
    so nothing of the size [rows, vocab] lives longer than a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        teacher: Teacher | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        best = torch.empty_like(targets)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        share = 0.0 if teacher is None else teacher.weight
        for rows in torch.arange(len(targets), device=targets.device).split(
            max(1, _CHUNK_LOGITS // len(head))
        ):
            part, chosen, weight = hidden[rows].to(head.dtype), targets[rows, None], weights[rows]
            logits = (part @ head.T).float()
            best[rows] = logits.argmax(dim=1)
            log_q = logits.log_softmax(dim=1)
            loss -= (1 - share) * (weight * log_q.gather(1, chosen).squeeze(1)).sum()
            p = None
            if teacher is not None and share:
                log_p = (teacher.hidden[rows].to(teacher.head.dtype) @ teacher.head.T).float()
                log_p = log_p.log_softmax(dim=1)
                p = log_p.exp()
                loss += share * (weight * (p * (log_p - log_q)).sum(dim=1)).sum()
            if of_hidden is None and of_head is None:
                continue
            change = log_q.exp_()  # [rows, vocab]
            change.scatter_add_(1, chosen, torch.full_like(chosen, share - 1.0, dtype=change.dtype))
            if p is not None:
                change.sub_(p, alpha=share)
            change *= weight[:, None]
            change = change.to(head.dtype)
            if of_hidden is not None:
                of_hidden[rows] = (change @ head).to(hidden.dtype)
            if of_head is not None:
                of_head += change.T @ part
        ctx.save_for_backward(of_hidden, None if of_head is None else of_head.to(head.dtype))
        ctx.mark_non_differentiable(best)
        return loss, best

    @staticmethod
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, of_head = ctx.saved_tensors
        scale = of_outputs[0]
        return (
            None if of_hidden is None else of_hidden * scale.to(of_hidden.dtype),
            None if of_head is None else of_head * scale.to(of_head.dtype),
            None,
            None,
            None,
        )


def head_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
    teacher: Teacher | None = None,
) -> HeadLoss:
    """Cross entropy of `hidden @ head.T` against targets and divergence from a teacher, summed over rows.

    Args:
        hidden: [rows, hidden].
        head: [vocab, hidden]; products are in its dtype. It may be trained too.
        targets: [rows] int64.
        weights: [rows] float32, of each row in the sum; None counts all 1.
        teacher: Whose distribution is learnt along; None learns the targets alone.
    """
    if weights is None:
        weights = torch.ones(len(targets), dtype=torch.float32, device=hidden.device)
    apply: Any = _HeadLoss.apply
    return HeadLoss(*apply(hidden, head, targets, weights, teacher))


def draft_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    vocab: DraftVocab,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
    teacher: Teacher | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`head_loss` of a draft; where the target is one that it cannot draft there is nothing to learn.

    Args:
        hidden: [rows, hidden].
        head: [tokens of `vocab`, hidden].
        vocab: What it drafts.
        targets: [rows] int64, the target's token ids.
        weights: [rows] float32, or None.
        teacher: With a head over the tokens of `vocab`, or None.

    Returns:
        The weighted sum, float32, and [rows] bool: whether the most probable token is the target.
    """
    places = vocab.places(targets)
    known = (places >= 0).float()
    weights = known if weights is None else weights * known
    found = head_loss(hidden, head, places.clamp(min=0), weights, teacher)
    return found.loss, found.best == places
