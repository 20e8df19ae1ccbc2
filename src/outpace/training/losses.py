"""Cross entropy over a large vocabulary without keeping its logits."""

from __future__ import annotations

from typing import Any

import torch

from outpace.models.draft_vocab import DraftVocab

_CHUNK_LOGITS = 1 << 22  # values of logits that are there at once: about what a cache holds


class _HeadCrossEntropy(torch.autograd.Function):
    """Sums weighted cross entropies, with the gradients worked out chunk by chunk on the way forward.

    The gradient of one row's loss with regard to its logits is softmax - onehot; it is used at once and
    forgotten, so nothing of the size [rows, vocab] lives longer than a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        best = torch.empty_like(targets)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in torch.arange(len(targets), device=targets.device).split(
            max(1, _CHUNK_LOGITS // len(head))
        ):
            part = hidden[rows].to(head.dtype)
            logits = (part @ head.T).float()
            best[rows] = logits.argmax(dim=1)
            log_probs = logits.log_softmax(dim=1)
            chosen = targets[rows, None]
            loss -= (weights[rows] * log_probs.gather(1, chosen).squeeze(1)).sum()
            if of_hidden is None and of_head is None:
                continue
            change = log_probs.exp_()  # [rows, vocab]
            change.scatter_add_(1, chosen, torch.full_like(chosen, -1.0, dtype=change.dtype))
            change *= weights[rows, None]
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
        )


def head_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of `hidden @ head.T` against targets, summed over rows.

    Args:
        hidden: [rows, hidden].
        head: [vocab, hidden]; products are in its dtype. It may be trained too.
        targets: [rows] int64.
        weights: [rows] float32, of each row in the sum; None counts all 1.

    Returns:
        The weighted sum, float32, and [rows] int64: the most probable token of each.
    """
    if weights is None:
        weights = torch.ones(len(targets), dtype=torch.float32, device=hidden.device)
    apply: Any = _HeadCrossEntropy.apply
    loss, best = apply(hidden, head, targets, weights)
    return loss, best


def draft_cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    vocab: DraftVocab,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`head_cross_entropy` of a draft; of a target that it cannot draft there is nothing to learn.

    Args:
        hidden: [rows, hidden].
        head: [tokens of `vocab`, hidden].
        vocab: What it drafts.
        targets: [rows] int64, the target's token ids.
        weights: [rows] float32, or None.

    Returns:
        The weighted sum, float32, and [rows] bool: whether the most probable token is the target.
    """
    places = vocab.places(targets)
    known = (places >= 0).float()
    loss, best = head_cross_entropy(
        hidden, head, places.clamp(min=0), known if weights is None else weights * known
    )
    return loss, best == places
