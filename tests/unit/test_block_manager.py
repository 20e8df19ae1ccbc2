"""Blocks: shared when equal, evicted in order, never lost, never written while shared."""

from __future__ import annotations

import random

import pytest

from outpace.config import BLOCK_SIZE
from outpace.request import Request, Sequence
from outpace.runtime.block_manager import BlockManager
from outpace.sampling import SamplingParams


def start(tokens: list[int]) -> Sequence:
    return Sequence.start(Request("r", tuple(tokens), SamplingParams(), 0, 1000))


def compute(blocks: BlockManager, sequence: Sequence) -> None:
    """All known tokens get their keys and values."""
    assert blocks.reserve(sequence, len(sequence.token_ids))
    sequence.num_computed = len(sequence.token_ids)
    blocks.register(sequence)


def admit(blocks: BlockManager, tokens: list[int]) -> Sequence:
    sequence = start(tokens)
    blocks.match(sequence)
    compute(blocks, sequence)
    return sequence


def words(seed: int, num_blocks: int, more: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(num_blocks * BLOCK_SIZE + more)]


def test_a_new_sequence_shares_the_longest_cached_beginning() -> None:
    blocks = BlockManager(16)
    first = admit(blocks, words(1, 3, 5))
    second = start(words(1, 2) + words(2, 2))
    blocks.match(second)
    assert second.block_ids == first.block_ids[:2]
    assert second.num_computed == second.num_cached == 2 * BLOCK_SIZE
    blocks.check([first, second])


def test_the_last_known_token_is_always_left_to_compute() -> None:
    blocks = BlockManager(16)
    admit(blocks, words(1, 3))
    again = start(words(1, 3))
    blocks.match(again)
    assert again.num_computed == 2 * BLOCK_SIZE


def test_the_same_block_after_another_beginning_is_another_block() -> None:
    blocks = BlockManager(16)
    admit(blocks, words(1, 1) + words(9, 1, 1))
    other = start(words(2, 1) + words(9, 1, 1))
    blocks.match(other)
    assert other.num_computed == 0


def test_a_hash_collision_is_harmless() -> None:
    ours, theirs = [-1] * BLOCK_SIZE + [0], [-2] * BLOCK_SIZE + [0]
    assert hash(tuple(ours)) == hash(tuple(theirs))  # CPython hashes -1 as -2
    blocks = BlockManager(4)
    admit(blocks, ours)
    other = start(theirs)
    blocks.match(other)
    assert other.block_ids == []


def test_cached_blocks_stay_until_no_free_one_is_left_and_then_the_oldest_goes() -> None:
    blocks = BlockManager(4)
    for seed in (1, 2):
        blocks.free(admit(blocks, words(seed, 1, 1)))  # leaves one cached and one free block
    assert blocks.num_free_blocks == 4
    big = start(words(3, 3))
    assert blocks.reserve(big, 3 * BLOCK_SIZE)  # two free ones and the cached block of 1
    blocks.check([big])
    gone, kept = start(words(1, 1, 1)), start(words(2, 1, 1))
    blocks.match(gone)
    blocks.match(kept)
    assert (gone.num_computed, kept.num_computed) == (0, BLOCK_SIZE)


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    blocks = BlockManager(3)
    blocks.free(admit(blocks, words(1, 3)))
    other = start(words(2, 1))
    assert blocks.reserve(other, BLOCK_SIZE)
    again = start(words(1, 3, 1))
    blocks.match(again)
    assert again.num_computed == 2 * BLOCK_SIZE


def test_reserving_is_all_or_nothing() -> None:
    blocks = BlockManager(4)
    sequence = start(words(1, 2))
    assert not blocks.reserve(sequence, 5 * BLOCK_SIZE)
    assert sequence.block_ids == []
    assert blocks.reserve(sequence, 4 * BLOCK_SIZE)
    assert blocks.num_free_slots == 0
    assert blocks.usage == 1.0


def test_trimming_keeps_known_and_computed_tokens_and_gives_drafts_back() -> None:
    blocks = BlockManager(8)
    sequence = start(words(1, 2, 1))
    blocks.reserve(sequence, 6 * BLOCK_SIZE)
    sequence.num_computed = 5
    blocks.trim(sequence)
    assert len(sequence.block_ids) == 3
    blocks.reserve(sequence, 6 * BLOCK_SIZE)
    sequence.num_computed = 3 * BLOCK_SIZE + 1  # one accepted draft beyond the known tokens' blocks
    blocks.trim(sequence)
    assert len(sequence.block_ids) == 4
    blocks.check([sequence])


def test_two_sequences_that_computed_the_same_end_up_sharing_it() -> None:
    blocks = BlockManager(8)
    first, second = start(words(1, 2, 3)), start(words(1, 2, 3))
    for sequence in (first, second):
        blocks.match(sequence)
        blocks.reserve(sequence, len(sequence.token_ids))
    for sequence in (first, second):
        sequence.num_computed = len(sequence.token_ids)
        blocks.register(sequence)
    assert first.block_ids[:2] == second.block_ids[:2]
    assert first.block_ids[2] != second.block_ids[2], "a block that is not full is never shared"
    blocks.check([first, second])


def test_only_computed_tokens_are_registered() -> None:
    blocks = BlockManager(8)
    sequence = start(words(1, 3))
    blocks.reserve(sequence, 3 * BLOCK_SIZE)
    sequence.num_computed = 2 * BLOCK_SIZE - 1
    blocks.register(sequence)
    other = start(words(1, 3))
    blocks.match(other)
    assert other.num_computed == BLOCK_SIZE


def test_without_prefix_caching_nothing_is_shared() -> None:
    blocks = BlockManager(8, enable_prefix_caching=False)
    blocks.free(admit(blocks, words(1, 3)))
    again = start(words(1, 3))
    blocks.match(again)
    assert again.num_computed == 0
    blocks.check()


def test_a_reset_forgets_prefixes_and_leaves_sequences_their_blocks() -> None:
    blocks = BlockManager(8)
    ended, running = admit(blocks, list(range(40))), admit(blocks, list(range(100, 140)))
    blocks.free(ended)
    blocks.reset_prefix_cache()
    blocks.check([running])
    assert blocks.num_free_blocks == 5
    assert admit(blocks, list(range(40))).num_cached == 0
    blocks.register(running)
    assert admit(blocks, list(range(100, 140))).num_cached == 32
    blocks.free(running)


def test_a_preempted_sequence_keeps_its_first_count_of_cached_tokens() -> None:
    blocks = BlockManager(8)
    sequence = start(words(1, 3, 1))
    blocks.match(sequence)
    compute(blocks, sequence)
    blocks.free(sequence)
    sequence.num_preemptions = 1
    blocks.match(sequence)
    assert (sequence.num_computed, sequence.num_cached) == (3 * BLOCK_SIZE, 0)


def test_the_check_notices_a_lost_block() -> None:
    blocks = BlockManager(4)
    sequence = admit(blocks, words(1, 2))
    with pytest.raises(AssertionError, match="users"):
        blocks.check([])
    sequence.block_ids.pop()
    with pytest.raises(AssertionError, match="users"):
        blocks.check([sequence])


def test_no_order_of_operations_loses_a_block() -> None:
    rng = random.Random(0)
    blocks = BlockManager(24)
    live: list[Sequence] = []
    for _ in range(3000):
        action = rng.random()
        if action < 0.3:
            sequence = start(words(rng.randrange(6), rng.randrange(1, 5), rng.randrange(BLOCK_SIZE)))
            blocks.match(sequence)
            if blocks.reserve(sequence, len(sequence.token_ids)):
                live.append(sequence)
            else:
                blocks.free(sequence)
        elif live and action < 0.7:
            sequence = rng.choice(live)
            missing = len(sequence.token_ids) - sequence.num_computed
            if blocks.reserve(sequence, len(sequence.token_ids) + rng.randrange(20)):
                sequence.num_computed += rng.randint(0, missing)
                blocks.trim(sequence)
                sequence.token_ids += words(rng.randrange(2), 0, rng.randrange(3))
                blocks.register(sequence)
        elif live:
            blocks.free(live.pop(rng.randrange(len(live))))
        blocks.check(live)
    for sequence in live:
        blocks.free(sequence)
    blocks.check()
    assert blocks.num_free_blocks == 24
