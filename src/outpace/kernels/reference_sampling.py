"""Filtering logits and choosing tokens, in plain torch: what the native kernels must reproduce.

Tokens are ranked by logit, best first; equal logits are ranked by token id, lowest first. Every cut
below (the k best, the nucleus, the argmax) follows this one order, so nothing is left to a sort's whim.
"""

from __future__ import annotations

import math

import torch

_LOW_32 = 0xFFFFFFFF


def filter_logits_(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> None:
    """Sets to -inf, in place, what each row's limits leave out.

    With `w = exp(logit - max)` in float64, each row in turn keeps
    (1) its `top_k` best tokens;
    (2) of those, each token whose better-ranked ones weigh less than `top_p` of them all: the smallest
    set of best tokens that reaches that share;
    (3) of those, tokens with `logit >= max + log(min_p)`.

    The best token always survives, tokens that are -inf stay so, and survivors keep their value. A row
    depends on nothing but itself. It needs one finite logit and neither NaN nor +inf.

    Args:
        logits: [rows, vocab] float32.
        top_k: [rows] int64; 0 (or the vocabulary's size and more) keeps all.
        top_p: [rows] float32 in (0, 1]; 1 keeps all.
        min_p: [rows] float32 in [0, 1]; 0 keeps all.
    """
    limits = zip(logits, top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True)
    for row, k, p, least in limits:
        if 0 < k < row.numel() or p < 1 or least > 0:
            _filter_row_(row, k, p, least)


def best_tokens(row: torch.Tensor, k: int) -> torch.Tensor:
    """The `k` best-ranked tokens of a row, best first.

    Args:
        row: [vocab].
        k: In [0, vocab].

    Returns:
        [k] int64 token ids.
    """
    if k == 0:
        return torch.empty(0, dtype=torch.int64)
    # topk alone would break ties at the threshold as it likes
    threshold = row.topk(k).values[-1]
    candidates = (row >= threshold).nonzero().squeeze(1)
    return _ranked(row, candidates)[:k]


def noisy_argmax(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, noisy: torch.Tensor
) -> torch.Tensor:
    """The best-ranked token of each row, after adding `gumbel_noise` where asked.

    With noise this draws from softmax(logits). Logits that are -inf are never chosen (a row needs a
    finite one). Sums are float32.

    Args:
        logits: [rows, vocab] float32 or bfloat16.
        seeds: [rows] int64.
        positions: [rows] int64, index in the sequence of the token being chosen, at least 0.
        noisy: [rows] bool.

    Returns:
        [rows] int64 token ids.
    """
    # max() and not argmax(), which is several times slower in bfloat16; both give the first of equals
    chosen = logits.max(dim=-1).indices
    for row in noisy.nonzero().squeeze(1).tolist():
        noise = gumbel_noise(seeds[row], positions[row], logits.shape[1])
        chosen[row] = noise.add_(logits[row]).max(dim=0).indices
    return chosen


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, a pure function of (seed, position, token).

    `u = (hash + 0.5) / 2**32`, `gumbel = -log(-log1p(-u))`, in float64, then rounded to float32. It
    falls as the hash grows, and lies within [-3.14, 22.88].

    One row at a time: where torch's vectors of elements begin and end can change the last bit of a
    logarithm, and must not depend on other rows.

    Args:
        seed: int64 scalar.
        position: int64 scalar.
        vocab_size: Number of tokens.

    Returns:
        [vocab_size] float32.
    """
    uniform = hash_tokens(seed, position, vocab_size).double().add_(0.5).mul_(2.0**-32)
    exponential = uniform.neg_().log1p_().neg_()
    return exponential.log_().neg_().float()


def hash_tokens(seed: torch.Tensor, position: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The counter-based random bits below all sampling.

    A 64-bit key (SplitMix64's output number `position + 1` from state `seed`) enters a 32-bit mixer of
    the token id in two halves, one before and one within its rounds. 32-bit unsigned arithmetic per
    token, wrapping around, so that a vector unit does 8 or 16 tokens at once.

    Args:
        seed: int64, a scalar or of any shape [...].
        position: The same.
        vocab_size: Number of tokens.

    Returns:
        [..., vocab_size] int64 in [0, 2**32).
    """
    key = _splitmix64(seed + _signed(0x9E3779B97F4A7C15) * (position + 1)).unsqueeze(-1)
    x = (torch.arange(vocab_size) * 0x9E3779B9 & _LOW_32) ^ (key & _LOW_32)
    x ^= x >> 16
    x.mul_(0x21F0AAAD).bitwise_and_(_LOW_32)
    x ^= x >> 15
    x.add_(_shift_right(key, 32)).bitwise_and_(_LOW_32)
    x.mul_(0x735A2D97).bitwise_and_(_LOW_32)
    x ^= x >> 15
    x.mul_(0x85EBCA6B).bitwise_and_(_LOW_32)
    x ^= x >> 13
    return x


def _filter_row_(row: torch.Tensor, top_k: int, top_p: float, min_p: float) -> None:
    best = row.max()
    kept = best_tokens(row, top_k) if 0 < top_k < row.numel() else torch.arange(row.numel())
    if top_p < 1:
        kept = _nucleus(row, kept, top_p)
    if min_p > 0:
        kept = kept[row[kept].double() >= best.double() + math.log(min_p)]
    values = row[kept]
    row.fill_(-math.inf)
    row[kept] = values


def _nucleus(row: torch.Tensor, tokens: torch.Tensor, top_p: float) -> torch.Tensor:
    weights = (row[tokens].double() - row.max().double()).exp_()
    total = weights.sum()
    # all tokens lighter than this weigh less together than what the nucleus leaves out: spare the sort
    tokens = tokens[weights >= total * (1 - top_p) / len(tokens)]
    tokens = _ranked(row, tokens)
    reached = (row[tokens].double() - row.max().double()).exp_().cumsum(0)
    return tokens[: 1 + int((reached < top_p * total).sum())]


def _ranked(row: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sorts `tokens`, given with ascending ids among equal logits, best first."""
    return tokens[row[tokens].sort(descending=True, stable=True).indices]


def _splitmix64(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64 read as uint64."""
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts int64 read as uint64: zeros come in, whatever the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    """A 64-bit constant as torch's int64 holds it."""
    return constant - (1 << 64)
