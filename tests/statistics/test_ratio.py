"""By both rules tokens follow the target's distribution, whatever is drafted; by broken ones they do not.

One test for all of it: the next two tokens of many seeds, against their exact distribution, by a chi-square
test of size 1e-3 with fixed seeds. Its power against another token in one answer of six is above 0.99.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pytest
import torch
from chi_square import follows
from test_verification import (
    KERNELS,
    TREES,
    VOCAB,
    as_it_is,
    at_the_root,
    choose,
    model,
    target_logits,
    verify,
)

from outpace.batch import Batch, BatchEntry, Decision, TargetOutput, Verdict
from outpace.kernels.reference_sampling import hash_tokens
from outpace.request import Request, Sequence
from outpace.sampling import Noise, SampleRow, SamplingParams, uniforms
from outpace.spec.verifier import MatchVerifier, RatioVerifier, SyntheticVerifier, Verifier, rows_to_sample
from outpace.tree import EMPTY_TREE, DraftTree

NUM_SEEDS = 1500
PROMPT = (1, 2)
PLAIN = SamplingParams(temperature=1.2)
FILTERED = SamplingParams(temperature=0.9, top_k=5, top_p=0.9)
BIASED = SamplingParams(min_p=0.1, logit_bias={4: 1.0})
HOT = SamplingParams(temperature=2.0)
PENALISED = SamplingParams(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=1.0)
# from a sequence to what is drafted for it
Draft = Callable[[Sequence], DraftTree]


# ---- Drafts ----


@functools.cache
def draft_probs(path: tuple[int, ...]) -> torch.Tensor:
    """[vocab], a draft model's distribution: like the target's, but not the same."""
    return torch.softmax(0.3 * model(path).float() + model((0, *path)).float(), dim=0)


@functools.cache
def gumbel(position: int) -> torch.Tensor:
    """[seeds, vocab], the target's own noise for choices."""
    bits = hash_tokens(torch.arange(NUM_SEEDS), torch.full((NUM_SEEDS,), position), VOCAB)
    return -(-torch.log1p(-(bits + 0.5) * 2.0**-32)).log()


def drawn(
    parents: tuple[int, ...], sequence: Sequence, noise: Callable[[int], torch.Tensor] = gumbel
) -> DraftTree:
    """A tree whose tokens are drawn with the noise that the match rule uses, siblings without replacement.

    The best of logits and Gumbel noise is a draw, the next best a draw from the others (Kool et al. 2019).
    """
    paths, token_ids, probs = [tuple(sequence.token_ids)], list[int](), list[torch.Tensor]()
    for parent in parents:
        path = paths[parent + 1]
        q = draft_probs(path).clone()
        q[[token for token, other in zip(token_ids, parents, strict=False) if other == parent]] = 0
        token_ids.append(int((q.log() + noise(len(path))[sequence.request.seed]).argmax()))
        probs.append(q / q.sum())
        paths.append((*path, token_ids[-1]))
    return DraftTree(parents, tuple(token_ids), probs=torch.stack(probs))


def drawn_chain(sequence: Sequence) -> DraftTree:
    return drawn((-1, 0), sequence)


def drawn_tree(sequence: Sequence) -> DraftTree:
    return drawn((-1, -1, -1, 0), sequence)


def drawn_with_replacement(sequence: Sequence) -> DraftTree:
    """Siblings that may draft the same token, as SpecInfer's."""
    known = tuple(sequence.token_ids)
    rng = random.Random(f"{sequence.request.seed} {len(known)}")
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
    counts = np.zeros((VOCAB, VOCAB), dtype=int)
    for seq in sequences:
        counts[tuple(seq.token_ids[2:4])] += 1
    return counts


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


@pytest.mark.parametrize(
    ("params", "draft"),
    [
        (PLAIN, drawn_chain),
        (PLAIN, drawn_tree),
        (PLAIN, drawn_with_replacement),
        (PLAIN, drawn_but_not_said),
        (FILTERED, picked_chain),
        (FILTERED, drawn_tree),
        (BIASED, drawn_chain),
        (BIASED, picked_tree),
        (PENALISED, drawn_chain),
        (PENALISED, picked_tree),
    ],
)
def test_by_the_ratio_rule_tokens_follow_the_target(params: SamplingParams, draft: Draft) -> None:
    assert draws_rightly(RatioVerifier(KERNELS), params, draft)


@pytest.mark.parametrize(("params", "draft"), [(PLAIN, drawn_tree), (PENALISED, drawn_chain)])
def test_by_the_match_rule_tokens_follow_the_target(params: SamplingParams, draft: Draft) -> None:
    assert draws_rightly(MatchVerifier(KERNELS), params, draft)


def test_the_test_has_the_size_and_the_power_that_are_claimed() -> None:
    rng = np.random.default_rng(0)

    def rejects(truth: np.ndarray, claim: np.ndarray, num_tests: int) -> float:
        tests = rng.multinomial(NUM_SEEDS, truth.ravel(), size=num_tests)
        return float(np.mean([not follows(counts, claim) for counts in tests]))

    for params in (PLAIN, FILTERED, BIASED, PENALISED):
        right = pair_probabilities(params)
        wrong = (5 * right + np.roll(right, 1, axis=0)) / 6
        assert rejects(right, right, 2000) <= 0.004
        assert rejects(wrong, right, 300) >= 0.99


# ---- How much is accepted ----


def share_accepted(params: SamplingParams, draft: Draft) -> np.ndarray:
    """How many answers accept no child of the root, and how many one."""
    sequences = sequences_for(params)
    decisions = verify(RatioVerifier(KERNELS), sequences, [draft(seq) for seq in sequences]).decisions
    accepted = [bool(decision and decision.path) for decision in decisions]
    return np.bincount(accepted, minlength=2)


@pytest.mark.parametrize("params", [PLAIN, FILTERED])
def test_the_ratio_rule_accepts_as_much_as_can_be(params: SamplingParams) -> None:
    """A drawn token by the overlap of p and q (Leviathan et al. 2023), picked ones by their probability."""
    p = distribution(params)
    overlap = np.minimum(p, draft_probs(PROMPT).numpy()).sum()
    assert follows(share_accepted(params, drawn_chain), np.array([1 - overlap, overlap]))
    picked = p[list(TREES[2].token_ids[:3])].sum()
    assert follows(share_accepted(params, picked_tree), np.array([1 - picked, picked]))


def test_synthetic_verification_accepts_at_its_rates() -> None:
    rates = (0.9, 0.6, 0.6, 0.1)
    sequences = sequences_for(PLAIN)
    tree = DraftTree((-1, -1, 0, 2, 3), (5, 4, 3, 2, 1))
    decisions = verify(SyntheticVerifier(KERNELS, rates), sequences, [tree] * NUM_SEEDS).decisions
    paths = [decision.path for decision in decisions if decision]
    assert set(paths) == {(), (0,), (0, 2, 3), (0, 2, 3, 4)}  # no path ends between equal rates
    lengths = np.bincount([len(path) for path in paths], minlength=5)
    assert follows(lengths, -np.diff([1, *rates, 0]))


# ---- Broken rules ----

Accepts = Callable[[float, float, float], bool]
Rest = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def by_the_ratio(number: float, p: float, q: float) -> bool:
    return number * q < p


def always(number: float, p: float, q: float) -> bool:
    return True


def if_the_target_likes_it_better(number: float, p: float, q: float) -> bool:
    return p >= q


def by_p_alone(number: float, p: float, q: float) -> bool:
    return number < p


def without_q(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    rest = (p - q).clamp(min=0)
    return rest / rest.sum()


def all_of_p(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return p


def own_row(tree: DraftTree, node: int) -> int:
    return node + 1


def parents_row(tree: DraftTree, node: int) -> int:
    return tree.parents[node] + 1


def one_per_node(numbers: list[float], node: int) -> float:
    return numbers[node]


def one_for_all(numbers: list[float], node: int) -> float:
    return numbers[0]


def by_seed_alone(rows: list[SampleRow]) -> list[SampleRow]:
    """Rows with the noise of the first position, whatever theirs is."""
    return [SampleRow(Sequence.start(row.sequence.request)) for row in rows]


@dataclass
class Variant(Verifier):
    """The ratio rule with its parts replaceable."""

    accepts: Accepts = by_the_ratio
    rest: Rest = without_q
    row: Callable[[DraftTree, int], int] = own_row
    number: Callable[[list[float], int], float] = one_per_node
    history: Callable[[list[SampleRow]], list[SampleRow]] = as_it_is
    noise: Callable[[list[SampleRow]], list[SampleRow]] = as_it_is
    dice: Noise = Noise.ACCEPTANCE
    recovery: Noise = Noise.RECOVERY

    def verify(self, batch: Batch, target: TargetOutput, allowed: torch.Tensor | None = None) -> Verdict:
        rows = rows_to_sample(batch)
        p = torch.softmax(target_logits(target.logits, self.history(rows)).double(), dim=-1)
        noise_rows = self.noise(rows)
        numbers = uniforms(noise_rows, 6, self.dice).tolist()
        walks = [self.walk(entry, p, numbers) for entry in batch.entries]
        lasts = [
            noise_rows[cast(int, entry.first_sample) + (path[-1] + 1 if path else 0)]
            for entry, (path, _) in zip(batch.entries, walks, strict=True)
        ]
        tokens = choose(torch.stack([rest for _, rest in walks]).log().float(), lasts, noise=self.recovery)
        return Verdict(
            tuple(
                Decision(path, (*(entry.tree.token_ids[node] for node in path), token))
                for entry, (path, _), token in zip(batch.entries, walks, tokens, strict=True)
            )
        )

    def walk(
        self, entry: BatchEntry, p: torch.Tensor, numbers: list[list[float]]
    ) -> tuple[tuple[int, ...], torch.Tensor]:
        tree, root = entry.tree, cast(int, entry.first_sample)
        path: list[int] = []
        here, rest = -1, p[root]
        for node, token in enumerate(tree.token_ids):
            if tree.parents[node] != here:
                continue
            q = torch.eye(VOCAB)[token] if tree.probs is None else tree.probs[node]
            if self.accepts(self.number(numbers[root + here + 1], node), float(rest[token]), float(q[token])):
                path.append(node)
                here, rest = node, p[root + self.row(tree, node)]
            else:
                rest = self.rest(rest, q)
        return tuple(path), rest


@pytest.mark.parametrize("draft", [drawn_tree, picked_tree])
def test_the_variant_with_nothing_replaced_is_the_ratio_rule(draft: Draft) -> None:
    sequences = sequences_for(PENALISED)[:200]
    trees = [draft(seq) for seq in sequences]
    assert verify(Variant(), sequences, trees) == verify(RatioVerifier(KERNELS), sequences, trees)


@pytest.mark.parametrize(
    ("broken", "params", "draft"),
    [
        (Variant(accepts=always), PLAIN, drawn_chain),
        (Variant(accepts=always), PLAIN, picked_chain),
        (Variant(accepts=if_the_target_likes_it_better), PLAIN, drawn_chain),
        (Variant(accepts=by_p_alone), PLAIN, drawn_chain),
        (Variant(rest=all_of_p), PLAIN, drawn_chain),
        (Variant(rest=all_of_p), PLAIN, picked_chain),
        (Variant(row=parents_row), PLAIN, drawn_chain),
        (Variant(number=one_for_all), PLAIN, picked_tree),
        (Variant(history=at_the_root), PENALISED, drawn_chain),
        (Variant(noise=by_seed_alone), PLAIN, picked_chain),
        (Variant(dice=Noise.CHOICE), PLAIN, drawn_chain),
        (Variant(recovery=Noise.ACCEPTANCE), PLAIN, picked_chain),
    ],
)
def test_a_broken_rule_is_found_out(broken: Variant, params: SamplingParams, draft: Draft) -> None:
    assert not draws_rightly(broken, params, draft)


# ---- Broken drafts: what DraftTree.probs must not be said of ----


def the_most_probable(sequence: Sequence) -> DraftTree:
    q = draft_probs(tuple(sequence.token_ids))
    return DraftTree((-1,), (int(q.argmax()),), probs=q[None])


def cut_where_unlikely(sequence: Sequence) -> DraftTree:
    """What a policy would do that cut drawn tokens by their confidence."""
    tree = drawn_chain(sequence)
    assert tree.probs is not None
    return tree if tree.probs[0, tree.token_ids[0]] > 0.2 else EMPTY_TREE


def best_first(sequence: Sequence) -> DraftTree:
    """Siblings in the order of their probability, not in that of their draws."""
    tree = drawn((-1, -1), sequence)
    q = draft_probs(tuple(sequence.token_ids))
    first, second = sorted(tree.token_ids, key=lambda token: -float(q[token]))
    rest = q.clone()
    rest[first] = 0
    return DraftTree((-1, -1), (first, second), probs=torch.stack((q, rest / rest.sum())))


def with_noise_used_before(sequence: Sequence) -> DraftTree:
    """Both tokens are drawn with the noise of the first."""
    return drawn((-1, 0), sequence, lambda position: gumbel(len(PROMPT)))


def as_if_with_replacement(sequence: Sequence) -> DraftTree:
    """Siblings drawn without replacement, each said to be from all of q."""
    tree = drawn((-1,) * 4, sequence)
    return replace(tree, probs=draft_probs(tuple(sequence.token_ids)).expand(4, -1))


BROKEN_DRAFTS = [
    the_most_probable,
    cut_where_unlikely,
    best_first,
    with_noise_used_before,
    as_if_with_replacement,
]


@pytest.mark.parametrize("draft", BROKEN_DRAFTS)
def test_a_draft_that_was_not_drawn_as_it_says_is_found_out(draft: Draft) -> None:
    assert not draws_rightly(RatioVerifier(KERNELS), HOT, draft)


@pytest.mark.parametrize("draft", [cut_where_unlikely, best_first])
def test_the_same_draft_is_harmless_if_it_says_nothing(draft: Draft) -> None:
    assert draws_rightly(RatioVerifier(KERNELS), HOT, lambda seq: replace(draft(seq), probs=None))
