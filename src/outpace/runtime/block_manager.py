"""Who owns which cache block: allocation, sharing of equal prefixes, eviction. Plain Python, no tensors."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from outpace.config import BLOCK_SIZE
from outpace.request import Sequence

_ROOT = 0  # the empty prefix

# A prefix is known by the prefix one block shorter and the tokens of its last block. As a dictionary key
# this chains the hashes and still compares the tokens, so a hash collision is harmless.
_Key = tuple[int, tuple[int, ...]]


class BlockManager:
    """Hands out cache blocks of `BLOCK_SIZE` tokens and remembers what the finished ones hold.

    A block is in one of three states: free (holds nothing), used (by one or more sequences), or cached
    (used by none, but it holds a known prefix and may be shared again or evicted, least recently used
    first). Only full blocks of computed tokens are ever registered, so a shared block is never written.

    A registered block's parent lives at least as long as the block: every sequence that uses a block uses
    its parents too, and gives back the last block first. Each operation costs O(1) per block.

    Attributes:
        num_blocks: Blocks in all.
        enable_prefix_caching: Whether equal prefixes share blocks.
    """

    def __init__(self, num_blocks: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self._num_users = [0] * num_blocks
        self._free = deque(range(num_blocks))
        self._cached: dict[int, None] = {}  # least recently used first
        self._block_of: dict[_Key, int] = {}
        self._key_of: list[_Key | None] = [None] * num_blocks
        self._prefix_of = [_ROOT] * num_blocks  # number of the prefix that ends in a registered block
        self._last_prefix = _ROOT

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_free_slots(self) -> int:
        """Tokens for which blocks can be handed out."""
        return self.num_free_blocks * BLOCK_SIZE

    @property
    def capacity(self) -> int:
        """Tokens that fit in all blocks."""
        return self.num_blocks * BLOCK_SIZE

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences use, in [0, 1]."""
        return 1.0 - self.num_free_blocks / self.num_blocks

    def match(self, sequence: Sequence) -> None:
        """Gives a sequence without blocks the longest cached beginning of its tokens.

        Sets `block_ids`, `num_computed` and, until the first preemption, `num_cached`. At least the last
        known token is left to be computed, since its logits are wanted.
        """
        assert not sequence.block_ids, f"{sequence.id} already has blocks"
        tokens, block_ids, prefix = sequence.token_ids, sequence.block_ids, _ROOT
        for end in range(BLOCK_SIZE, len(tokens), BLOCK_SIZE):
            block = self._block_of.get((prefix, tuple(tokens[end - BLOCK_SIZE : end])))
            if block is None:
                break
            self._take(block)
            block_ids.append(block)
            prefix = self._prefix_of[block]
        sequence.num_computed = len(block_ids) * BLOCK_SIZE
        if sequence.num_preemptions == 0:
            sequence.num_cached = sequence.num_computed

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes sure that logical indices [0, num_tokens) of a sequence have blocks: all or nothing.

        Returns:
            Whether they have; if not, nothing changed.
        """
        num_missing = _blocks_for(num_tokens) - len(sequence.block_ids)
        if num_missing > self.num_free_blocks:
            return False
        for _ in range(num_missing):
            sequence.block_ids.append(self._allocate())
        return True

    def trim(self, sequence: Sequence) -> None:
        """Takes back the blocks beyond those that hold known or computed tokens.

        What a rejected draft had reserved comes back; what a prompt still needs stays.
        """
        num_kept = _blocks_for(max(sequence.num_computed, len(sequence.token_ids)))
        if num_kept < len(sequence.block_ids):
            self._give_back(sequence.block_ids[num_kept:])
            del sequence.block_ids[num_kept:]

    def register(self, sequence: Sequence) -> None:
        """Makes the full blocks of computed tokens known, so that later sequences can share them.

        Where another block already holds the same prefix the sequence changes over to that one and its
        own comes back: `sequence.block_ids` may change in place.
        """
        if not self.enable_prefix_caching:
            return
        block_ids, tokens = sequence.block_ids, sequence.token_ids
        num_full = min(sequence.num_computed, len(tokens)) // BLOCK_SIZE
        first = num_full
        while first > 0 and self._key_of[block_ids[first - 1]] is None:
            first -= 1
        for index in range(first, num_full):
            prefix = self._prefix_of[block_ids[index - 1]] if index else _ROOT
            key = (prefix, tuple(tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]))
            twin = self._block_of.get(key)
            if twin is None:
                self._name(block_ids[index], key)
            else:
                self._take(twin)
                self._give_back([block_ids[index]])
                block_ids[index] = twin

    def free(self, sequence: Sequence) -> None:
        """Takes back all blocks of a sequence, which then has computed nothing."""
        self._give_back(sequence.block_ids)
        sequence.block_ids.clear()
        sequence.num_computed = 0

    def reset_prefix_cache(self) -> None:
        """Forgets what blocks hold; sequences keep theirs, and may share what they compute from now on."""
        self._block_of.clear()
        self._key_of = [None] * self.num_blocks
        self._free.extend(self._cached)
        self._cached.clear()

    def check(self, sequences: Iterable[Sequence] = ()) -> None:
        """Verifies the invariants: free + used + cached = total, and who uses what.

        Args:
            sequences: All that hold blocks.

        Raises:
            AssertionError: A block is lost, counted twice, or owned by nobody.
        """
        users = Counter(block for sequence in sequences for block in sequence.block_ids)
        used = {block for block, count in enumerate(self._num_users) if count}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(used) + len(cached) == self.num_blocks, "free + used + cached != total"
        assert free | used | cached == set(range(self.num_blocks)), "a block is in two states"
        assert users == Counter({block: self._num_users[block] for block in used}), "users miscounted"
        assert all(self._key_of[block] is None for block in free), "a free block is registered"
        named = {block: key for block, key in enumerate(self._key_of) if key is not None}
        assert cached <= named.keys(), "a cached block is not registered"
        assert {key: block for block, key in named.items()} == self._block_of, "the prefix table is wrong"

    def _allocate(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block = next(iter(self._cached))
            del self._cached[block]
            key = self._key_of[block]
            assert key is not None
            del self._block_of[key]
            self._key_of[block] = None
        self._num_users[block] = 1
        return block

    def _take(self, block: int) -> None:
        """One more sequence uses a registered block."""
        if self._num_users[block] == 0:
            del self._cached[block]
        self._num_users[block] += 1

    def _give_back(self, block_ids: list[int]) -> None:
        """One sequence fewer uses each of these; children go first, so they are evicted first."""
        for block in reversed(block_ids):
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                if self._key_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def _name(self, block: int, key: _Key) -> None:
        self._last_prefix += 1
        self._prefix_of[block] = self._last_prefix
        self._key_of[block] = key
        self._block_of[key] = block


def _blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)
