"""Whatever was drafted, the answer is the one without drafts; and breaking the rule breaks these tests.

The model here is a deterministic function from the whole path to logits, so a token accepted at the wrong
place, or judged with another node's history or noise, sends the rest of the answer elsewhere.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from chi_square import fits

from outpace import sampling
from outpace.batch import Batch, BatchEntry, Decision, TargetOutput, Verdict
from outpace.kernels.reference import ReferenceKernels
from outpace.request import Request, Sequence
from outpace.sampling import SampleRow, SamplingParams
from outpace.spec.verifier import MatchVerifier, Verifier, matched_path, rows_to_sample
from outpace.tree import EMPTY_TREE, DraftTree

KERNELS = ReferenceKernels()
target_logits = functools.partial(sampling.target_logits, kernels=KERNELS)
choose = functools.partial(sampling.choose, kernels=KERNELS)

VOCAB = 6
NUM_TOKENS = 40
REQUESTS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.3),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.0, top_p=0.8, presence_penalty=0.7),
    SamplingParams(temperature=1.5, top_k=4, frequency_penalty=0.5),
]
# [requests] answers with the tokens of the prompt in front
Answers = list[list[int]]
# (what is known so far, what the answer will be) -> a draft
Proposer = Callable[[random.Random, list[int], list[int]], DraftTree]


@functools.cache
def model(path: tuple[int, ...]) -> torch.Tensor:
    """[vocab] bfloat16 logits, a function of every token of the path."""
    generator = torch.Generator().manual_seed(zlib.crc32(bytes(path)))
    return torch.randn(VOCAB, generator=generator).bfloat16()


# ---- Proposers ----


def nothing(_: random.Random, known: list[int], answer: list[int]) -> DraftTree:
    return EMPTY_TREE


def random_chain(rng: random.Random, known: list[int], answer: list[int]) -> DraftTree:
    return DraftTree.chain(tuple(rng.choices(range(VOCAB), k=rng.randrange(6))))


def random_tree(rng: random.Random, known: list[int], answer: list[int]) -> DraftTree:
    """Branching, with equal tokens under different parents, and some under the same."""
    parents = tuple(rng.randrange(-1, min(node, 3)) for node in range(rng.randrange(16)))
    return DraftTree(parents, tuple(rng.choices(range(VOCAB), k=len(parents))))


def most_probable(_: random.Random, known: list[int], answer: list[int]) -> DraftTree:
    path: list[int] = []
    for _depth in range(4):
        path.append(int(model((*known, *path)).float().argmax()))
    return DraftTree.chain(tuple(path))


def the_answer(_: random.Random, known: list[int], answer: list[int]) -> DraftTree:
    return DraftTree.chain(tuple(answer[len(known) : len(known) + 5]))


def the_answer_behind_decoys(_: random.Random, known: list[int], answer: list[int]) -> DraftTree:
    """The answer's next tokens t1 t2 t3, a wrong sibling before each, and t2 t3 also under wrong parents.

    root -> 0:wrong 1:t1;  0 -> 2:t2, 2 -> 5:t3;  1 -> 3:wrong 4:t2;  3 -> 6:t3;  4 -> 7:wrong 8:t3
    """
    ahead = answer[len(known) : len(known) + 3]
    if len(ahead) < 3:
        return EMPTY_TREE
    t1, t2, t3 = ahead
    w1, w2, w3 = ((t + 1) % VOCAB for t in ahead)
    return DraftTree((-1, -1, 0, 1, 1, 2, 3, 4, 4), (w1, t1, t2, w2, t2, t3, t3, w3, t3))


def never_right(_: random.Random, known: list[int], answer: list[int]) -> DraftTree:
    return DraftTree.chain(tuple((t + 1) % VOCAB for t in answer[len(known) : len(known) + 3]))


PROPOSERS: list[Proposer] = [
    random_chain,
    random_tree,
    most_probable,
    the_answer,
    the_answer_behind_decoys,
    never_right,
]


# ---- Decoding ----


def decode(verifier: Verifier, proposer: Proposer, expected: Answers | None = None) -> tuple[Answers, int]:
    """Answers of all requests, decoded in one batch, and the number of steps this took."""
    rng = random.Random(0)
    sequences = [
        Sequence.start(Request(str(i), (i, 5, i), params, seed=i * 1000, max_tokens=NUM_TOKENS))
        for i, params in enumerate(REQUESTS)
    ]
    num_steps = 0
    while running := [s for s in sequences if s.num_output < NUM_TOKENS]:
        trees = [proposer(rng, s.token_ids, expected[int(s.id)]) if expected else EMPTY_TREE for s in running]
        for seq, decision in zip(running, verify(verifier, running, trees).decisions, strict=True):
            assert decision is not None
            seq.token_ids += decision.token_ids[: NUM_TOKENS - seq.num_output]
        num_steps += 1
    return [s.token_ids for s in sequences], num_steps


def verify(verifier: Verifier, sequences: list[Sequence], trees: list[DraftTree]) -> Verdict:
    """One step of the path model; verification reads nothing of the batch but its entries."""
    entries: list[BatchEntry] = []
    logits: list[torch.Tensor] = []
    for seq, tree in zip(sequences, trees, strict=True):
        entries.append(BatchEntry(seq, len(logits), 1, tree, len(logits)))
        paths = [tuple(seq.token_ids)]
        for parent, token_id in zip(tree.parents, tree.token_ids, strict=True):
            paths.append((*paths[parent + 1], token_id))
        logits += [model(path) for path in paths]
    batch = cast(Batch, SimpleNamespace(entries=tuple(entries)))
    return verifier.verify(batch, TargetOutput(torch.stack(logits)))


@functools.cache
def without_drafts() -> Answers:
    answers, num_steps = decode(MatchVerifier(KERNELS), nothing)
    assert num_steps == NUM_TOKENS
    return answers


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_the_answer_does_not_depend_on_what_was_drafted(proposer: Proposer) -> None:
    answers, _ = decode(MatchVerifier(KERNELS), proposer, without_drafts())
    assert answers == without_drafts()


def test_right_drafts_are_accepted_and_wrong_ones_are_not() -> None:
    steps = {p.__name__: decode(MatchVerifier(KERNELS), p, without_drafts())[1] for p in PROPOSERS}
    assert steps["the_answer"] == 7  # 40 tokens, 6 a step
    assert steps["the_answer_behind_decoys"] == 10  # 4 a step
    assert steps["never_right"] == NUM_TOKENS
    assert steps["most_probable"] < NUM_TOKENS


# ---- Broken rules ----


def first_child(tree: DraftTree, chosen: list[int]) -> tuple[int, ...]:
    """Accepts the first child, whatever was chosen."""
    path: list[int] = []
    for node, parent in enumerate(tree.parents):
        if parent == (path[-1] if path else -1):
            path.append(node)
    return tuple(path)


def anybodys_child(tree: DraftTree, chosen: list[int]) -> tuple[int, ...]:
    """Accepts the token that was chosen, but under any parent."""
    path: list[int] = []
    for node, token_id in enumerate(tree.token_ids):
        if token_id == chosen[path[-1] + 1 if path else 0]:
            path.append(node)
    return tuple(path)


def chosen_by_the_parents_sibling(tree: DraftTree, chosen: list[int]) -> tuple[int, ...]:
    """Looks up the choice one row too early."""
    return matched_path(tree, [chosen[0], *chosen[:-1]])


def at_the_root(rows: list[SampleRow]) -> list[SampleRow]:
    """Rows that have lost the position and history of their node."""
    return [SampleRow(row.sequence) for row in rows]


def as_it_is(rows: list[SampleRow]) -> list[SampleRow]:
    return rows


class Variant(Verifier):
    """The match rule with its parts replaceable."""

    def __init__(
        self,
        path: Callable[[DraftTree, list[int]], tuple[int, ...]] = matched_path,
        history: Callable[[list[SampleRow]], list[SampleRow]] = as_it_is,
        noise: Callable[[list[SampleRow]], list[SampleRow]] = as_it_is,
    ) -> None:
        self.path, self.history, self.noise = path, history, noise

    def verify(self, batch: Batch, target: TargetOutput, allowed: torch.Tensor | None = None) -> Verdict:
        rows = rows_to_sample(batch)
        chosen = choose(target_logits(target.logits, self.history(rows)), self.noise(rows))
        return Verdict(tuple(self.decide(entry, chosen) for entry in batch.entries))

    def decide(self, entry: BatchEntry, chosen: list[int]) -> Decision:
        root = cast(int, entry.first_sample)
        path = self.path(entry.tree, chosen[root : root + 1 + len(entry.tree)])
        last = root + 1 + path[-1] if path else root
        return Decision(path, (*(entry.tree.token_ids[node] for node in path), chosen[last]))


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_the_variant_with_nothing_replaced_is_the_match_rule(proposer: Proposer) -> None:
    assert decode(Variant(), proposer, without_drafts())[0] == without_drafts()


@pytest.mark.parametrize(
    ("broken", "proposer"),
    [
        (Variant(path=first_child), random_chain),
        (Variant(path=first_child), the_answer_behind_decoys),
        (Variant(path=anybodys_child), random_tree),
        (Variant(path=chosen_by_the_parents_sibling), random_tree),
        (Variant(noise=at_the_root), random_tree),
        (Variant(noise=at_the_root), most_probable),
        (Variant(history=at_the_root), random_tree),
        (Variant(history=at_the_root), most_probable),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_rule_changes_the_answer(broken: Verifier, proposer: Proposer) -> None:
    assert decode(broken, proposer, without_drafts())[0] != without_drafts()


# ---- Distribution ----


def pairs_drawn(verifier: Verifier, tree: DraftTree, num_seeds: int) -> np.ndarray:
    """How often each pair of next two tokens comes [vocab, vocab], over seeds, with `tree` drafted first."""
    sequences = [
        Sequence.start(Request(str(seed), (1, 2), SamplingParams(temperature=1.2), seed, 2))
        for seed in range(num_seeds)
    ]
    counts = np.zeros((VOCAB, VOCAB), dtype=int)
    for decision, seq in zip(
        verify(verifier, sequences, [tree] * num_seeds).decisions, sequences, strict=True
    ):
        assert decision is not None
        seq.token_ids += decision.token_ids
    short = [seq for seq in sequences if seq.num_output < 2]
    for decision, seq in zip(
        verify(verifier, short, [EMPTY_TREE] * len(short)).decisions, short, strict=True
    ):
        assert decision is not None
        seq.token_ids += decision.token_ids
    for seq in sequences:
        counts[tuple(seq.token_ids[2:4])] += 1
    return counts


def pair_probabilities() -> np.ndarray:
    """Exact [vocab, vocab]."""
    rows = [model((1, 2)), *(model((1, 2, first)) for first in range(VOCAB))]
    p: np.ndarray = torch.softmax(torch.stack(rows).double() / 1.2, dim=-1).numpy()
    pairs: np.ndarray = p[0][:, None] * p[1:]
    return pairs


TREES = [EMPTY_TREE, DraftTree.chain((3, 0)), DraftTree((-1, -1, -1, 0, 0, 2), (0, 1, 4, 2, 3, 5))]


@pytest.mark.parametrize("tree", TREES, ids=["no tree", "chain", "branching"])
def test_two_tokens_follow_the_target_whatever_is_drafted(tree: DraftTree) -> None:
    """Chi-square of size 1e-3 on all 36 pairs; fixed seeds."""
    assert fits(pairs_drawn(MatchVerifier(KERNELS), tree, 3000), pair_probabilities())


def test_noise_used_twice_would_be_noticed_in_the_distribution() -> None:
    counts = pairs_drawn(Variant(noise=at_the_root), TREES[2], 3000)
    assert not fits(counts, pair_probabilities())
