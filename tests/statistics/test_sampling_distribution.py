"""Tokens are drawn from softmax(target_logits), independently at each position and for each seed.

Every assertion is a chi-square test of size 1e-3 with fixed seeds: 36 that must pass, and one that must not.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from chi_square import fits

from outpace import sampling
from outpace.kernels.reference import ReferenceKernels
from outpace.kernels.reference_sampling import hash_tokens
from outpace.request import Request, Sequence
from outpace.sampling import SampleRow, SamplingParams

KERNELS = ReferenceKernels()
target_logits = functools.partial(sampling.target_logits, kernels=KERNELS)
choose = functools.partial(sampling.choose, kernels=KERNELS)

NUM_DRAWS = 6000
LOGITS = torch.tensor([2.0, 1.5, 1.0, 1.0, 0.5, 0.0, -0.5, -1.0]).bfloat16()
PARAMS = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.6),
    "top_k": SamplingParams(temperature=1.3, top_k=4),
    "top_p and min_p": SamplingParams(top_p=0.9, min_p=0.1),
    "penalised": SamplingParams(repetition_penalty=1.2, presence_penalty=0.4, logit_bias={7: 2.0}),
}


def draw(params: SamplingParams, seeds: range, lengths: range) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [seeds, lengths] drawn after prompts of so many tokens, and the exact distribution [vocab]."""
    rows = []
    for seed in seeds:
        for length in lengths:
            request = Request("r", (2,) * length, params, seed, 10)
            rows.append(SampleRow(Sequence.start(request)))
    target = target_logits(LOGITS.expand(len(rows), -1), rows)
    chosen = np.array(choose(target, rows)).reshape(len(seeds), len(lengths))
    return chosen, torch.softmax(target[0].double(), dim=-1).numpy()


def counts_of(tokens: np.ndarray) -> np.ndarray:
    return np.bincount(tokens.ravel(), minlength=len(LOGITS))


def pair_counts(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    size = len(LOGITS)
    return np.bincount(left.ravel() * size + right.ravel(), minlength=size * size)


@pytest.mark.parametrize("name", PARAMS)
def test_over_many_seeds_tokens_follow_the_target(name: str) -> None:
    tokens, expected = draw(PARAMS[name], seeds=range(NUM_DRAWS), lengths=range(3, 4))
    assert fits(counts_of(tokens), expected)


@pytest.mark.parametrize("name", PARAMS)
def test_over_many_positions_tokens_follow_the_target(name: str) -> None:
    tokens, expected = draw(PARAMS[name], seeds=range(-7, -3), lengths=range(1, NUM_DRAWS // 4 + 1))
    assert fits(counts_of(tokens), expected)


def test_the_wrong_temperature_would_be_noticed() -> None:
    tokens, _ = draw(SamplingParams(temperature=1.0), seeds=range(NUM_DRAWS), lengths=range(1, 2))
    _, wrong = draw(SamplingParams(temperature=0.8), seeds=range(1), lengths=range(1, 2))
    assert not fits(counts_of(tokens), wrong)


def test_tokens_at_neighbouring_positions_and_seeds_are_independent() -> None:
    params = SamplingParams(temperature=2.0)
    tokens, p = draw(params, seeds=range(100, 180), lengths=range(1, 101))
    pairs = np.outer(p, p)
    assert fits(pair_counts(tokens[:, :-1], tokens[:, 1:]), pairs)
    assert fits(pair_counts(tokens[:, :-2], tokens[:, 2:]), pairs)
    assert fits(pair_counts(tokens[:-1], tokens[1:]), pairs)
    assert fits(pair_counts(tokens[:-1, 1:], tokens[1:, :-1]), pairs)


def hashes(by: str, rows: int, vocab: int) -> np.ndarray:
    """[rows, vocab] for seeds or positions that follow each other, the other one fixed."""
    run, fixed = torch.arange(rows), torch.full((rows,), 3)
    seeds, positions = (run, fixed) if by == "seed" else (fixed, run)
    return hash_tokens(seeds, positions, vocab).numpy()


@pytest.mark.parametrize("by", ["seed", "position"])
def test_all_bits_of_the_hash_are_uniform(by: str) -> None:
    bits = hashes(by, rows=60, vocab=49152)
    for low in (0, 10, 20):
        assert fits(np.bincount((bits >> low).ravel() & 0xFFF, minlength=4096))


@pytest.mark.parametrize("by", ["seed", "position"])
def test_neighbouring_hashes_are_independent(by: str) -> None:
    bits = hashes(by, rows=60, vocab=49152)
    high, low = bits >> 24, bits & 0xFF
    for octet in (high, low):
        for left, right in (
            (octet[:, :-1], octet[:, 1:]),  # the next token
            (octet[:-1], octet[1:]),  # the next seed or position
            (octet[:-1, 1:], octet[1:, :-1]),
        ):
            assert fits(np.bincount((left * 256 + right).ravel(), minlength=65536))


@pytest.mark.parametrize("by", ["seed", "position"])
def test_among_equal_logits_every_token_wins_equally_often(by: str) -> None:
    winners = hashes(by, rows=3000, vocab=4096).argmin(axis=1)  # noise falls as the hash grows
    assert fits(np.bincount(winners // 16, minlength=256))
    assert fits(np.bincount(winners % 256, minlength=256))
