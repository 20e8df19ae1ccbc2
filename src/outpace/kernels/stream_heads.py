"""What is worked out beside a pass for Speculative Streaming: weights, and what training shares with serving.

models/streams.py has the formulas, `Kernels` what is served. All of it is small: on a CPU the twenty calls of
torch that each takes cost more than their arithmetic, so native.py has them in one call each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

UNIT_EPS = 1e-6  # of the norm that gives states and embeddings unit rms
_LEAST_Q = 1e-6  # of a draft's probabilities, whose logarithm is taken


@dataclass(frozen=True, slots=True)
class TokenChange:
    """What the token before changes in what a stream says: s' = s + U silu(V s + E e).

    A token's embedding and its row w of the head meet a stream only in a sum of `rank` numbers, which are
    kept for each token that can be drafted.

    Attributes:
        said: [rank, hidden], V.
        before: [rank, hidden], E.
        up: [rank, hidden], the transpose of U.
        befores: [tokens, rank] float32, E e of each token.
        afters: [tokens, rank] float32, the transpose of U times w of each token.
    """

    said: torch.Tensor
    before: torch.Tensor
    up: torch.Tensor
    befores: torch.Tensor
    afters: torch.Tensor


@dataclass(frozen=True, slots=True)
class EarlyExit:
    """Weights of p = sigmoid(a·log q + (s·w + b)·h + c), h = x + U (V x).

    Attributes:
        down: [rank, hidden] float32, V.
        up: [rank, hidden] float32, the transpose of U.
        bias: [hidden] float32, b.
        scalars: [3] float32: a, s and c.
        head: [vocab, hidden], whose rows are w.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor
    scalars: torch.Tensor
    head: torch.Tensor


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of x, [..., hidden], with unit rms, in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=UNIT_EPS)


def exit_logits(weights: EarlyExit, x: torch.Tensor, tokens: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The early exit's logits that tokens follow rows.

    Args:
        weights: Its weights.
        x: [..., hidden], for each token the normed state of the row that it would follow.
        tokens: [...] int64, which row of the head each has.
        q: [...], what drafting gave it.

    Returns:
        [...] float32.
    """
    x = x.float()
    h = x + (x @ weights.down.T) @ weights.up
    a, s, c = weights.scalars
    match = (h * (s * weights.head[tokens].float() + weights.bias)).sum(-1)
    logits: torch.Tensor = a * q.float().clamp(min=_LEAST_Q).log() + match + c
    return logits
