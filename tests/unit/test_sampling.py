"""From logits to the target distribution and to a token, against slow references written for reading."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from outpace.errors import InvalidRequestError
from outpace.kernels.reference_sampling import best_tokens, filter_logits_, gumbel_noise, noisy_argmax
from outpace.request import Request, Sequence
from outpace.sampling import SampleRow, SamplingParams, choose, target_logits, token_logprobs

VOCAB = 61


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """bfloat16 logits: with 8 bits of mantissa, ties are common."""
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)).mul(3).bfloat16()


def sequence(
    params: SamplingParams,
    prompt: tuple[int, ...] = (3, 4),
    answer: tuple[int, ...] = (),
    eos: tuple[int, ...] = (1,),
    bad_words: tuple[tuple[int, ...], ...] = (),
    seed: int = 7,
) -> Sequence:
    params = replace(params, bad_words=tuple("w" * len(word) for word in bad_words))
    request = Request("r", prompt, params, seed, 100, frozenset(eos), bad_words)
    return Sequence(request, [*prompt, *answer])


def target_of(logits: torch.Tensor, *rows: SampleRow, **more: Any) -> torch.Tensor:
    return target_logits(logits, list(rows), **more)


def kept(row: torch.Tensor) -> set[int]:
    return set((row > -math.inf).nonzero().squeeze(1).tolist())


# ---- filters ----


def slow_filter(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Which tokens stay, one rule after the other."""
    tokens = sorted((t for t in range(len(logits)) if logits[t] > -math.inf), key=lambda t: (-logits[t], t))
    best = logits[tokens[0]]
    if top_k:
        tokens = tokens[:top_k]
    if top_p < 1:
        weights = [math.exp(logits[t] - best) for t in tokens]
        while len(tokens) > 1 and sum(weights[:-1]) >= top_p * sum(weights[: len(weights)] + cut_off(weights)):
            break
        tokens = nucleus(tokens, weights, top_p)
    return {t for t in tokens if min_p == 0 or logits[t] - best >= math.log(min_p)}


def cut_off(_: list[float]) -> list[float]:
    return []


def nucleus(tokens: list[int], weights: list[float], top_p: float) -> list[int]:
    return tokens
