"""The one shape of a draft."""

from __future__ import annotations

import random

import pytest
import torch

from outpace.tree import EMPTY_TREE, DraftTree

#      root
#     /    \
#    0:5    1:9
#   /  \      \
# 2:7  3:5    4:7
BRANCHING = DraftTree((-1, -1, 0, 0, 1), (5, 9, 7, 5, 7), (0.6, 0.3, 0.5, 0.2, 0.9))


def random_tree(rng: random.Random, num_nodes: int) -> DraftTree:
    parents = tuple(rng.randrange(-1, node) for node in range(num_nodes))
    return DraftTree(parents, tuple(rng.randrange(50) for _ in parents))


def test_a_chain_is_a_tree_of_width_one() -> None:
    chain = DraftTree.chain((4, 5, 6), (0.9, 0.8, 0.7))
    assert chain == DraftTree((-1, 0, 1), (4, 5, 6), (0.9, 0.8, 0.7))
    assert chain.is_chain()
    assert chain.depths() == [1, 2, 3]


def test_an_empty_tree_is_a_chain_without_nodes() -> None:
    assert len(EMPTY_TREE) == 0
    assert EMPTY_TREE.is_chain()
    assert EMPTY_TREE.depths() == []
    assert DraftTree.chain(()) == EMPTY_TREE


def test_depth_counts_the_edges_from_the_root() -> None:
    assert BRANCHING.depths() == [1, 1, 2, 2, 2]
    assert not BRANCHING.is_chain()


def test_two_children_of_the_root_are_no_chain() -> None:
    assert not DraftTree((-1, -1), (5, 9)).is_chain()


def test_cutting_keeps_the_best_nodes_and_their_confidence() -> None:
    assert BRANCHING.cut(3) == DraftTree((-1, -1, 0), (5, 9, 7), (0.6, 0.3, 0.5))
    assert BRANCHING.cut(0) == DraftTree((), (), ())


def test_cutting_to_more_than_there_is_changes_nothing() -> None:
    assert BRANCHING.cut(5) is BRANCHING
    assert BRANCHING.cut(99) is BRANCHING


def test_every_prefix_of_a_tree_is_a_valid_tree() -> None:
    rng = random.Random(0)
    for _ in range(50):
        tree = random_tree(rng, rng.randrange(20))
        for num_nodes in range(len(tree) + 1):
            prefix = tree.cut(num_nodes)
            assert len(prefix) == num_nodes
            assert prefix.depths() == tree.depths()[:num_nodes]


@pytest.mark.parametrize("parents", [(0,), (-2,), (-1, 1), (-1, 2, 0)])
def test_a_parent_that_does_not_come_first_is_refused(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="parents come before their children"):
        DraftTree(parents, tuple(range(len(parents))))


def test_parts_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="1 parents for 2 tokens"):
        DraftTree((-1,), (5, 6))
    with pytest.raises(ValueError, match="1 confidences for 2 tokens"):
        DraftTree((-1, 0), (5, 6), (0.5,))


def test_distributions_are_cut_with_their_nodes_and_one_belongs_to_each() -> None:
    probs = torch.rand(5, 50)
    tree = DraftTree(BRANCHING.parents, BRANCHING.token_ids, probs=probs)
    cut = tree.cut(3).probs
    assert cut is not None
    assert torch.equal(cut, probs[:3])
    with pytest.raises(ValueError, match="4 distributions for 5 tokens"):
        DraftTree(BRANCHING.parents, BRANCHING.token_ids, probs=probs[:4])


def test_kept_nodes_find_their_parents_again() -> None:
    assert BRANCHING.keep(range(len(BRANCHING))) is BRANCHING
    tree = DraftTree((-1, -1, 0, 1, 3), (5, 9, 7, 8, 6), (0.6, 0.3, 0.5, 0.4, 0.2))
    assert tree.keep([1, 3, 4]) == DraftTree((-1, 0, 1), (9, 8, 6), (0.3, 0.4, 0.2))
    assert tree.keep([1, 0, 3]) == DraftTree((-1, -1, 0), (9, 5, 8), (0.3, 0.6, 0.4))
    assert tree.keep([]) == DraftTree((), (), ())


def test_paths_spell_the_drafted_tokens_down_to_each_node() -> None:
    assert DraftTree((-1, -1, 0, 1, 3), (5, 9, 7, 8, 6)).paths() == [(5,), (9,), (5, 7), (9, 8), (9, 8, 6)]


def test_best_first_goes_by_the_probability_of_the_whole_path() -> None:
    tree = DraftTree((-1, -1, 0, 1), (5, 9, 7, 8), (0.3, 0.6, 1.0, 0.9))
    assert tree.best_first() == DraftTree((-1, 0, -1, 2), (9, 8, 5, 7), (0.6, 0.9, 0.3, 1.0))
    unknown = DraftTree((-1, 0), (5, 6))
    assert unknown.best_first() is unknown
