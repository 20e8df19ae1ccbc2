"""How far a draft's distribution is from the target's, without keeping the logits of either."""

from __future__ import annotations

from typing import Any

import torch

_CHUNK_LOGITS = 1 << 22  # values of logits that are there at once, of each of the two


class _HeadDivergence(torch.autograd.Function):
    """Sums (1 - w) · cross entropy + w · KL(p || q), p the teacher's; its gradient on the way forward.

    With regard to a row's logits that is q - (1 - w) · onehot - w · p; it is used at once and forgotten, as
    in `head_cross_entropy`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        teacher: torch.Tensor,
        kl_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss, total_kl = (torch.zeros((), dtype=torch.float32, device=hidden.device) for _ in range(2))
        best = torch.empty_like(targets)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in torch.arange(len(targets), device=targets.device).split(
            max(1, _CHUNK_LOGITS // len(head))
        ):
            logits = (hidden[rows].to(head.dtype) @ head.T).float()
            best[rows] = logits.argmax(dim=1)
            log_q = logits.log_softmax(dim=1)
            log_p = (teacher[rows].to(head.dtype) @ head.T).float().log_softmax(dim=1)
            p, chosen = log_p.exp(), targets[rows, None]
            kl = (p * (log_p - log_q)).sum()
            loss += kl_weight * kl - (1 - kl_weight) * log_q.gather(1, chosen).sum()
            total_kl += kl
            if of_hidden is not None:
                change = log_q.exp_().sub_(p, alpha=kl_weight)  # [rows, vocab]
                change.scatter_add_(1, chosen, torch.full_like(chosen, kl_weight - 1, dtype=change.dtype))
                of_hidden[rows] = (change.to(head.dtype) @ head).to(hidden.dtype)
        ctx.save_for_backward(of_hidden)
        ctx.mark_non_differentiable(best, total_kl)
        return loss, best, total_kl

    @staticmethod
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * of_outputs[0].to(of_hidden.dtype), None, None, None, None


def head_divergence(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    teacher: torch.Tensor,
    kl_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Cross entropy against targets and divergence from a teacher with the same head, summed over rows.

    Args:
        hidden: [rows, hidden], the draft's.
        head: [vocab, hidden], not trained; products are in its dtype.
        targets: [rows] int64.
        teacher: [rows, hidden], the target's, where the draft has `hidden`.
        kl_weight: Share of the divergence in the loss, in [0, 1]; the rest is the cross entropy's.

    Returns:
        The loss, float32; [rows] int64, the most probable token of each; the sum of KL(teacher || draft).
    """
    apply: Any = _HeadDivergence.apply
    loss, best, kl = apply(hidden, head, targets, teacher, kl_weight)
    return loss, best, float(kl)
