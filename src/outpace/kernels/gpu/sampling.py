"""Filters and the noisy argmax in Triton; kernels/reference_sampling.py states both functions.

A program has a row, or a piece of one, and walks it block by block. Nothing is sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from outpace.kernels.gpu.common import EXACT, num_programs

FILTER_BLOCK = 4096  # tokens that a program looks at at once
NOISE_BLOCK = 1024
MASS_UNIT = tl.constexpr(float(1 << 40))  # masses are whole numbers of these: their sum has no order
LOWEST = tl.constexpr(-(1 << 31))  # below every key


@triton.jit
def _mix(z):
    """SplitMix64's finaliser."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _hash(token, low, high):
    """32 random bits for each token from the halves of a row's key."""
    x = (token.to(tl.uint32) * 0x9E3779B9) ^ low
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x += high
    x *= 0x735A2D97
    x ^= x >> 15
    x *= 0x85EBCA6B
    x ^= x >> 13
    return x


@triton.jit
def _rough_noise(bits):
    """Gumbel noise to about 1e-4, in float32: both ends of the uniform number are kept exact enough."""
    uniform = (bits.to(tl.float32) + 0.5) * (2.0**-32)
    rest = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (2.0**-32)
    near_0 = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0)))
    return -tl.log(tl.where(uniform < 2.0**-7, near_0, -tl.log(rest)))


@triton.jit
def _exact_noise(bits):
    """Gumbel noise in float64, rounded to float32. 1 - u has 33 bits: the logarithm loses nothing."""
    rest = 1.0 - (bits.to(tl.float64) + 0.5) * (2.0**-32)
    return (-tl.log(-tl.log(rest))).to(tl.float32)


@triton.jit(do_not_specialize=["piece", "seeds", "positions", "noisy"])
def _noisy_argmax(
    best_values,
    best_tokens,
    logits,
    seeds,
    positions,
    noisy,
    vocab,
    piece,
    logits_stride,
    BLOCK: tl.constexpr,
):
    """The best token of a piece of a row. Exact noise is made only where rough noise says it could matter."""
    row, part = tl.program_id(0), tl.program_id(1)
    from_logits = logits + row.to(tl.int64) * logits_stride
    is_noisy = tl.load(noisy + row) != 0
    position = tl.load(positions + row).to(tl.uint64, bitcast=True)
    key = _mix(tl.load(seeds + row).to(tl.uint64, bitcast=True) + (position + 1) * 0x9E3779B97F4A7C15)
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    nothing = float("-inf")
    best = float("-inf")
    chosen = part * piece
    end = tl.minimum((part + 1) * piece, vocab)
    for begin in range(part * piece, end, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        value = tl.load(from_logits + token, mask=token < end, other=nothing).to(tl.float32)
        bound = tl.max(value, 0)
        bits = _hash(token, low, high)
        if is_noisy:
            bound = tl.max(value + _rough_noise(bits), 0)
            bound += 0.01 + tl.where(bound > nothing, tl.abs(bound), 0.0) * 1e-6
        if bound > best:
            if is_noisy:
                value += _exact_noise(bits)
            top = tl.max(value, 0)
            if top > best:
                best = top
                chosen = tl.min(tl.where(value == top, token, vocab), 0)
    at = row * tl.num_programs(1) + part
    tl.store(best_values + at, best)
    tl.store(best_tokens + at, chosen)


@triton.jit(do_not_specialize=["pieces"])
def _best_piece(out, best_values, best_tokens, pieces, PADDED: tl.constexpr):
    """The best of a row's pieces; of equal ones the first, which has the lowest token."""
    row = tl.program_id(0)
    part = tl.arange(0, PADDED)
    value = tl.load(best_values + row * pieces + part, mask=part < pieces, other=float("-inf"))
    first = tl.min(tl.where(value == tl.max(value, 0), part, PADDED), 0)
    # Garbage in a row of padding leaves none: any token will do.
    first = tl.minimum(first, pieces - 1)
    tl.store(out + row, tl.load(best_tokens + row * pieces + first).to(tl.int64))


@triton.jit
def _keys(values):
    """Whole numbers in the order of the logits; both zeros are one."""
    values = tl.where(values == 0.0, 0.0, values)
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _logit(key):
    """The logit whose key this is."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weights(values, best, BY_MASS: tl.constexpr):
    """What tokens count for: their share of the best one's probability, or one each."""
    if BY_MASS:
        return (tl.exp(values - best) * MASS_UNIT).to(tl.int64)
    return tl.full(values.shape, 1, tl.int64)


@triton.jit
def _weigh(row_logits, vocab, key, best, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Weight and least key of the tokens whose key is `key` or more; the greatest key of the others."""
    total = tl.zeros([BLOCK], tl.int64)
    above = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    below = tl.full([BLOCK], LOWEST, tl.int32)
    for begin in range(0, vocab, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        there = token < vocab
        values = tl.load(row_logits + token, mask=there, other=float("-inf"))
        keys = _keys(values)
        counts = there & (keys >= key)
        total += tl.where(counts, _weights(values, best, BY_MASS), 0)
        above = tl.minimum(above, tl.where(counts, keys, 0x7FFFFFFF))
        below = tl.maximum(below, tl.where(there & (keys < key), keys, LOWEST))
    return tl.sum(total, 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _cut(row_logits, vocab, low, high, goal, best, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest key of a token down to which tokens weigh `goal`, in [low, high], keys of tokens."""
    while low < high:
        middle = (low.to(tl.int64) + high.to(tl.int64) + 1) >> 1
        total, above, below = _weigh(row_logits, vocab, middle.to(tl.int32), best, BY_MASS, BLOCK)
        enough = total >= goal
        low = tl.where(enough, above, low)
        high = tl.where(enough, high, below)
    return low


@triton.jit(do_not_specialize=["top_k", "top_p", "min_p"])
def _filter(logits, top_k, top_p, min_p, vocab, logits_stride, BLOCK: tl.constexpr):
    """Removes of a row what its limits leave out; a row without limits is not touched."""
    row = tl.program_id(0)
    row_logits = logits + row.to(tl.int64) * logits_stride
    k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    by_k = (k > 0) & (k < vocab)
    if by_k | (p < 1.0) | (least > 0.0):
        best_of = tl.full([BLOCK], float("-inf"), tl.float32)
        worst_of = tl.full([BLOCK], float("inf"), tl.float32)
        for begin in range(0, vocab, BLOCK):
            token = begin + tl.arange(0, BLOCK)
            values = tl.load(row_logits + token, mask=token < vocab, other=float("-inf"))
            best_of = tl.maximum(best_of, values)
            worst_of = tl.minimum(worst_of, tl.where(token < vocab, values, float("inf")))
        best = tl.max(best_of, 0)
        high, low = _keys(best), _keys(tl.min(worst_of, 0))
        # Tokens above `cut` stay, and of those with the key itself the first `ties`.
        cut = low - 1
        ties = k * 0
        if by_k:
            cut = _cut(row_logits, vocab, low, high, k, best, False, BLOCK)
            above, _, _ = _weigh(row_logits, vocab, cut + 1, best, False, BLOCK)
            ties = k - above
        if p < 1.0:
            above, _, _ = _weigh(row_logits, vocab, cut + 1, best, True, BLOCK)
            total = above + ties * _weights(_logit(cut), best, True)
            goal = tl.ceil(total.to(tl.float64) * p.to(tl.float64)).to(tl.int64)
            # All tokens lighter than this weigh less together than what the nucleus leaves out: fewer steps.
            lightest = best + tl.log((1.0 - p) * 0.5 / vocab)
            _, low, _ = _weigh(row_logits, vocab, _keys(lightest), best, False, BLOCK)
            cut = _cut(row_logits, vocab, low, high, goal, best, True, BLOCK)
            above, _, _ = _weigh(row_logits, vocab, cut + 1, best, True, BLOCK)
            # Tokens there weigh something, or a greater key would have done.
            each = _weights(_logit(cut), best, True)
            ties = (goal - above + each - 1) // each
        # A share of 0 asks for nothing, and has no logarithm.
        share = tl.where(least > 0.0, least, 1.0).to(tl.float64)
        floor = tl.where(least > 0.0, best.to(tl.float64) + tl.log(share), float("-inf"))

        seen = tl.zeros_like(ties)
        for begin in range(0, vocab, BLOCK):
            token = begin + tl.arange(0, BLOCK)
            values = tl.load(row_logits + token, mask=token < vocab, other=float("-inf"))
            keys = _keys(values)
            equals = (token < vocab) & (keys == cut)
            rank = seen + tl.cumsum(equals.to(tl.int64), 0)
            goes = (keys < cut) | (equals & (rank > ties)) | (values.to(tl.float64) < floor)
            tl.store(row_logits + token, float("-inf"), mask=(token < vocab) & goes)
            seen += tl.sum(equals.to(tl.int64), 0)


def filter_logits_(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> None:
    """See `Kernels.filter_logits_`."""
    rows, vocab = logits.shape
    if rows:
        block = min(FILTER_BLOCK, triton.next_power_of_2(vocab))
        _filter[(rows,)](
            logits, top_k, top_p, min_p, vocab, logits.stride(0), BLOCK=block, num_warps=16, **EXACT
        )


def noisy_argmax(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, noisy: torch.Tensor
) -> torch.Tensor:
    """See `Kernels.noisy_argmax`. Into how many pieces a row is cut does not change which token is best."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    block = min(NOISE_BLOCK, triton.next_power_of_2(vocab))
    wanted = triton.cdiv(2 * num_programs(logits.device), rows)
    piece = triton.cdiv(triton.cdiv(vocab, wanted), block) * block
    pieces = triton.cdiv(vocab, piece)
    best_values = torch.empty(rows, pieces, dtype=torch.float32, device=logits.device)
    best_tokens = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
    _noisy_argmax[(rows, pieces)](
        best_values,
        best_tokens,
        logits,
        seeds,
        positions,
        noisy,
        vocab,
        piece,
        logits.stride(0),
        BLOCK=block,
        **EXACT,
    )
    _best_piece[(rows,)](
        out, best_values, best_tokens, pieces, PADDED=triton.next_power_of_2(pieces), num_warps=1
    )
    return out
