"""Under both rules tokens follow the target's distribution, whatever is drafted and however; broken rules fail.

One test for all of it: the next two tokens of many seeds, against their exact distribution, by a chi-square
test of size 1e-3. Its power is measured below: a rule that goes wrong in one answer of ten is found out.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import cast

import numpy as np
import pytest
import torch
from chi_square import follows
from test_verification import KERNELS, TREES, VOCAB, as_it_is, at_the_root, choose, model, target_logits, verify

from outpace.batch import Batch, BatchEntry, Decision, TargetOutput, Verdict
from outpace.kernels.reference_sampling import gumbel_noise
from outpace.request import Request, Sequence
from outpace.sampling import Noise, SampleRow, SamplingParams, uniforms
from outpace.spec.verifier import MatchVerifier, RatioVerifier, SyntheticVerifier, Verifier, rows_to_sample
from outpace.tree import EMPTY_TREE, DraftTree

NUM_SEEDS = 2500
PROMPT = (1, 2)
PARAMS = {
    "plain": SamplingParams(temperature=1.2),
    "top_k, top_p": SamplingParams(temperature=0.9, top_k=5, top_p=0.9),
    "min_p, bias": SamplingParams(min_p=0.1, logit_bias={4: 1.0}),
    "penalties": SamplingParams(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=1.0),
}
# from a sequence to what is drafted for it
Draft = Callable[[Sequence], DraftTree]


# ---- Drafts ----


@functools.cache
def draft_probs(path: tuple[int, ...]) -> torch.Tensor:
    """[vocab], a draft model's distribution: like the target's, but not the same."""
    return torch.softmax(0.6 * model(path).float() + 0.8 * model((0, *path)).float(), dim=0)


def drawn(parents: tuple[int, ...], sequence: Sequence, probs: Callable[..., torch.Tensor]) -> DraftTree:
    """A tree with tokens drawn from `probs` with the target's noise, siblings without replacement.

    The best of logits and Gumbel noise is a draw, the next best a draw from the others (Kool et al. 2019).
    """
    paths, token_ids, rows = [tuple(sequence.token_ids)], list[int](), list[torch.Tensor]()
    for parent in parents:
        path = paths[parent + 1]
        siblings = [t for t, other in zip(token_ids, parents, strict=False) if other == parent]
        q = probs(path).clone()
        q[siblings] = 0
        seed, position = torch.tensor(sequence.request.seed), torch.tensor(len(path))
        token_ids.append(int((q.log() + gumbel_noise(seed, position, VOCAB)).argmax()))
        rows.append(q / q.sum())
        paths.append((*path, token_ids[-1]))
    return DraftTree(parents, tuple(token_ids), probs=torch.stack(rows))


def drawn_chain(sequence: Sequence) -> DraftTree:
    return drawn((-1, 0), sequence, draft_probs)


def drawn_tree(sequence: Sequence) -> DraftTree:
    return drawn((-1, -1, -1, 0, 0), sequence, draft_probs)


def drawn_with_replacement(sequence: Sequence) -> DraftTree:
    """Siblings that may draft the same token, as SpecInfer's."""
    known = tuple(sequence.token_ids)
    rng = random.Random(f"{sequence.request.seed} {known}")  # noise is good for one draw only
    q = draft_probs(known)
    first, second = rng.choices(range(VOCAB), q.tolist(), k=2)
    below = draft_probs((*known, first))
    third = rng.choices(range(VOCAB), below.tolist())
    return DraftTree((-1, -1, 0), (first, second, *third), probs=torch.stack((q, q, below)))


def drawn_but_not_said(sequence: Sequence) -> DraftTree:
    return replace(drawn_tree(sequence), probs=None)


def picked_chain(sequence: Sequence) -> DraftTree:
    return TREES[1]


def picked_tree(sequence: Sequence) -> DraftTree:
    return TREES[2]


DRAFTS: list[Draft] = [
    drawn_chain,
    drawn_tree,
    drawn_with_replacement,
    drawn_but_not_said,
    picked_chain,
    picked_tree,
]


# ---- The test ----


def sequences_for(params: SamplingParams) -> list[Sequence]:
    return [Sequence.start(Request(str(seed), PROMPT, params, seed, 2)) for seed in range(NUM_SEEDS)]


def pairs_drawn(verifier: Verifier, params: SamplingParams, draft: Draft) -> np.ndarray:
    """How often each pair of next two tokens comes, [vocab, vocab]."""
    sequences = sequences_for(params)
    while running := [seq for seq in sequences if seq.num_output < 2]:
        verdict = verify(verifier, running, [draft(seq) for seq in running])
        for seq, decision in zip(running, verdict.decisions, strict=True):
            assert decision is not None
            seq.token_ids += decision.token_ids
    pairs = np.array([seq.token_ids[2:4] for seq in sequences])
    return np.bincount(pairs @ (VOCAB, 1), minlength=VOCAB**2).reshape(VOCAB, VOCAB)


def distribution(params: SamplingParams, *answer: int) -> np.ndarray:
    """What the next token of an answer is drawn from, [vocab]."""
    known = (*PROMPT, *answer)
    row = SampleRow(Sequence(Request("r", PROMPT, params, 0, 9), list(known)))
    p: np.ndarray = torch.softmax(target_logits(model(known)[None], [row]).double(), dim=-1)[0].numpy()
    return p


def pair_probabilities(params: SamplingParams) -> np.ndarray:
    """Exact, [vocab, vocab]."""
    seconds = np.stack([distribution(params, first) for first in range(VOCAB)])
    pairs: np.ndarray = distribution(params)[:, None] * seconds
    return pairs


def draws_rightly(verifier: Verifier, params: SamplingParams, draft: Draft) -> bool:
    return follows(pairs_drawn(verifier, params, draft), pair_probabilities(params))


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("rule", [MatchVerifier, RatioVerifier])
def test_two_tokens_follow_the_target(rule: type[MatchVerifier], params: str, draft: Draft) -> None:
    assert draws_rightly(rule(KERNELS), PARAMS[params], draft)


def test_the_test_has_the_size_and_the_power_that_are_claimed() -> None:
    rng = np.random.default_rng(0)
    for params in PARAMS.values():
        right = pair_probabilities(params)
        wrong = 0.9 * right + 0.1 * np.roll(right, 1)  # every tenth answer takes another token
        size = np.mean([not follows(rng.multinomial(NUM_SEEDS, right.ravel()), right) for _ in range(2000)])
        power = np.mean([not follows(rng.multinomial(NUM_SEEDS, wrong.ravel()), right) for _ in range(500)])
        print(size, power)


