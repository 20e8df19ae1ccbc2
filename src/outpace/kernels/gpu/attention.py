"""Attention over the paged cache with a tree mask, in Triton.

One arithmetic, however the work is divided. A row's softmax goes by position: steps of STEP positions within
splits whose borders are fixed positions (`_split_begin`), an online softmax in each split, splits folded
together in order. Which program computes which split is planned on the device from the batch (`_plan_items`);
what it computes depends on the row's own path alone. So bits depend neither on the batch nor on the plan, and
a tree's row gets what plain decoding gives it: its keys are gathered by position before they are multiplied
(`_trace_paths`).

Nothing here reads a value on the host, and every shape follows from the shapes of `Rows`: a pass can be
captured in a CUDA graph and replayed with other rows in the same tensors. For padding, sequences may have no
rows, rows may follow the last sequence's, which then get no output, and a slot below 0 is not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from outpace.config import BLOCK_SIZE
from outpace.kernels.base import Heads, LayerAttention, RopeTable, Rows
from outpace.kernels.gpu.common import EXACT, INTERPRETED, dot, narrow, num_programs

BLOCK = tl.constexpr(BLOCK_SIZE)
STEP = tl.constexpr(64)  # positions of one product
# Small splits give a lone short sequence to many programs, large ones keep a long one's fold short.
FINE_SPLIT = tl.constexpr(256)
FINE_END = tl.constexpr(4096)  # splits are FINE_SPLIT positions below, COARSE_SPLIT from here on
COARSE_SPLIT = tl.constexpr(1024)
NEVER = tl.constexpr(1 << 30)  # a position that no row has
WIDTH = tl.constexpr(64)  # items that a program of `_list_items` writes at once

# Arguments for whose alignment or value no kernel is to be compiled anew.
OF_ROWS = ("positions", "slots", "parents", "row_starts", "context_lens", "block_tables")
TILE = 64  # queries of a tile: the least that Hopper's warp-group product takes, enough for a long prompt
# Heads that a program takes where it takes few; the interpreter is slow by the program, not by the head.
HEADS_PIECE, FOLD_PIECE = (64, 64) if INTERPRETED.value else (8, 1)
PARTIAL_BYTES = 64 << 20  # memory of the softmax states that programs hand on, at most


@triton.jit
def _split_of(position):
    fine = position // FINE_SPLIT
    coarse = FINE_END // FINE_SPLIT + (position - FINE_END) // COARSE_SPLIT
    return tl.where(position < FINE_END, fine, coarse)


@triton.jit
def _split_begin(split):
    fine = split * FINE_SPLIT
    coarse = FINE_END + (split - FINE_END // FINE_SPLIT) * COARSE_SPLIT
    return tl.where(fine < FINE_END, fine, coarse)


@triton.jit(do_not_specialize=[*OF_ROWS, "num_sequences"])
def _trace_paths(
    positions,
    parents,
    row_starts,
    context_lens,
    tiles,
    tile_splits,
    forks,
    leaves,
    jumps,
    near,
    num_sequences,
    TILE_ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Says for each tile whose rows it has, and for each row where its path leaves the sequence's own order.

    A row is in place where its index in the sequence's cache is its position; then so are its ancestors, for
    parents come before their children. Written for each row:

    - forks: the first position of its path that is out of place, NEVER if none is;
    - leaves: a row of the tile, on whose path it lies: the last one. Itself if it is in place;
    - near [rows, STEP]: the indices of its path's out-of-place part within its own step of positions;
    - jumps: its nearest ancestor out of place before that step.
    """
    tile = tl.program_id(0)
    # A sequence's tiles begin where no earlier sequence's can be: row_starts[s] // TILE_ROWS + s.
    low, high = 0, num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(row_starts + middle) // TILE_ROWS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    sequence = low
    start = tl.load(row_starts + sequence)
    first = (tile - start // TILE_ROWS - sequence) * TILE_ROWS
    count = tl.minimum(tl.load(row_starts + sequence + 1) - start - first, TILE_ROWS)
    count = tl.maximum(count, 0)

    index = tl.arange(0, PADDED)
    valid = index < count
    row = start + first + index
    position = tl.load(positions + row, mask=valid, other=-1)
    context = tl.load(context_lens + sequence)
    current = first + index  # the rows on the way down, counted from the sequence's first
    depth = position - context
    out = valid & (current != depth)
    branches = tl.max(out.to(tl.int32), 0)
    fork = tl.full([PADDED], NEVER, tl.int32)
    jump = tl.full([PADDED], -1, tl.int32)
    leaf = index
    while tl.max(out.to(tl.int32), 0) > 0:
        at = context + depth
        close = out & (at // STEP == position // STEP)
        tl.store(near + row.to(tl.int64) * STEP + at % STEP, context + current, mask=close)
        jump = tl.where(out & (at // STEP != position // STEP) & (jump < 0), start + current, jump)
        fork = tl.where(out, at, fork)
        passes = out[None, :] & ((current - first)[None, :] == index[:, None])
        leaf = tl.maximum(leaf, tl.max(tl.where(passes, index[None, :], -1), 1))
        current = tl.load(parents + start + current, mask=out, other=0)
        depth -= 1
        out = out & (current != depth)
    tl.store(forks + row, fork, mask=valid)
    tl.store(leaves + row, start + first + leaf, mask=valid)
    tl.store(jumps + row, jump, mask=valid)

    tl.store(tiles + tile * 4, sequence)
    tl.store(tiles + tile * 4 + 1, start + first)
    tl.store(tiles + tile * 4 + 2, count)
    tl.store(tiles + tile * 4 + 3, branches)
    last = tl.max(position, 0)
    tl.store(tile_splits + tile, tl.where(count > 0, _split_of(last) + 1, 0))


@triton.jit(do_not_specialize=["num_tiles", "max_partials"])
def _plan_items(
    tiles,
    tile_splits,
    item_starts,
    partial_starts,
    num_items,
    num_tiles,
    num_kv_heads,
    num_workers,
    max_partials,
    PADDED: tl.constexpr,
):
    """Decides which tiles are divided among programs, and where their parts go.

    A tile is divided if alone in one program it would take longer than each program's even share of the work,
    or a quarter of that if it has few rows: their parts hand on little, and no program is left with a whole
    tile at the end. And while there is memory for the states handed on, one per row and split.
    """
    tile = tl.arange(0, PADDED)
    valid = tile < num_tiles
    splits = tl.load(tile_splits + tile, mask=valid, other=0)
    rows = tl.load(tiles + tile * 4 + 2, mask=valid, other=0)
    share = tl.sum(splits, 0) * num_kv_heads // num_workers
    long = splits * 4 > share * tl.minimum(rows, 4)
    partials = tl.where((splits > 1) & long, splits * rows, 0)
    ends = tl.cumsum(partials, 0)
    divided = (partials > 0) & (ends <= max_partials)
    items = tl.where(divided, splits, tl.minimum(splits, 1))
    item_ends = tl.cumsum(items, 0)
    tl.store(item_starts + tile, item_ends - items, mask=valid)
    tl.store(partial_starts + tile, tl.where(divided, ends - partials, -1), mask=valid)
    tl.store(num_items, tl.sum(items, 0))


@triton.jit
def _list_items(
    tiles,
    tile_splits,
    item_starts,
    partial_starts,
    items,
    row_partials,
    PADDED: tl.constexpr,
):
    """Writes the items of a tile, (tile, split) or (tile, -1) for all its splits, and its rows' partials."""
    tile = tl.program_id(0)
    first = tl.load(tiles + tile * 4 + 1)
    count = tl.load(tiles + tile * 4 + 2)
    splits = tl.load(tile_splits + tile)
    start = tl.load(item_starts + tile)
    partial = tl.load(partial_starts + tile)
    for begin in range(0, tl.where(partial < 0, tl.minimum(splits, 1), splits), WIDTH):
        split = begin + tl.arange(0, WIDTH)
        mask = split < tl.where(partial < 0, 1, splits)
        tl.store(items + (start + split) * 2, tile, mask=mask)
        tl.store(items + (start + split) * 2 + 1, tl.where(partial < 0, -1, split), mask=mask)
    index = tl.arange(0, PADDED)
    at = tl.where(partial < 0, -1, partial + index * splits)
    tl.store(row_partials + first + index, at, mask=index < count)


@triton.jit(do_not_specialize=[*OF_ROWS, "rows"])
def _norm_rope_cache(
    qkv,
    k_cache,
    v_cache,
    positions,
    slots,
    cos_sin,
    q_norm,
    k_norm,
    eps,
    rows,
    qkv_stride,
    k_block,
    k_head,
    k_slot,
    k_dim,
    v_block,
    v_head,
    v_slot,
    v_dim,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PIECE: tl.constexpr,
    NORMED: tl.constexpr,
):
    """Norms and rotates heads, PIECE in a program: queries in place, the rest into the cache."""
    HALF: tl.constexpr = HEAD_DIM // 2
    EVERY: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    at = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    row, head = at // EVERY, at % EVERY
    there = row < rows
    dim = tl.arange(0, PADDED_HALF)
    inside = there[:, None] & (dim < HALF)[None, :]
    is_q = (head < NUM_HEADS)[:, None]
    is_k = ((head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS))[:, None]
    is_v = (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]
    source = qkv + (row.to(tl.int64) * qkv_stride + head * HEAD_DIM)[:, None] + dim[None, :]
    left_in = tl.load(source, mask=inside, other=0.0)
    right_in = tl.load(source + HALF, mask=inside, other=0.0)
    kind = left_in.dtype
    left, right = left_in.to(tl.float32), right_in.to(tl.float32)

    if NORMED:
        squares = tl.sum(left * left, 1) + tl.sum(right * right, 1)
        inverse = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        in_half = dim < HALF
        # Rounded before the weight and after it, as Hugging Face does.
        q_left = tl.load(q_norm + dim, mask=in_half, other=0.0).to(tl.float32)[None, :]
        k_left = tl.load(k_norm + dim, mask=in_half, other=0.0).to(tl.float32)[None, :]
        q_right = tl.load(q_norm + HALF + dim, mask=in_half, other=0.0).to(tl.float32)[None, :]
        k_right = tl.load(k_norm + HALF + dim, mask=in_half, other=0.0).to(tl.float32)[None, :]
        left = narrow(left * inverse, kind).to(tl.float32) * tl.where(is_q, q_left, k_left)
        right = narrow(right * inverse, kind).to(tl.float32) * tl.where(is_q, q_right, k_right)
        left, right = narrow(left, kind).to(tl.float32), narrow(right, kind).to(tl.float32)

    angles = cos_sin + tl.load(positions + row, mask=there, other=0).to(tl.int64)[:, None] * HEAD_DIM
    cos = tl.load(angles + dim[None, :], mask=inside, other=0.0)
    sin = tl.load(angles + HALF + dim[None, :], mask=inside, other=0.0)
    turned_left = narrow(left * cos - right * sin, kind)
    turned_right = narrow(right * cos + left * sin, kind)
    tl.store(source, turned_left, mask=inside & is_q)
    tl.store(source + HALF, turned_right, mask=inside & is_q)

    slot = tl.load(slots + row, mask=there, other=-1)
    cached = inside & (slot >= 0)[:, None]
    block, offset = (slot // BLOCK).to(tl.int64), slot % BLOCK
    kv_head = head - NUM_HEADS
    to_k = k_cache + (block * k_block + offset * k_slot + kv_head * k_head)[:, None] + dim[None, :] * k_dim
    tl.store(to_k, turned_left, mask=cached & is_k)
    tl.store(to_k + HALF * k_dim, turned_right, mask=cached & is_k)
    kv_head -= NUM_KV_HEADS
    to_v = v_cache + (block * v_block + offset * v_slot + kv_head * v_head)[:, None] + dim[None, :] * v_dim
    tl.store(to_v, left_in, mask=cached & is_v)
    tl.store(to_v + HALF * v_dim, right_in, mask=cached & is_v)


@triton.jit
def _not_0(total):
    """For queries that only fill the tile."""
    return tl.where(total > 0.0, total, 1.0)


@triton.jit
def _attend_step(q, k, v, allowed, top, total, mixed, scale):
    """Takes a step's positions into the softmax of a split; a row that sees none of them stays as it is."""
    nothing = float("-inf")
    scores = tl.where(allowed, dot(q, k) * scale, nothing)
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == nothing, 0.0, new_top)
    weights = tl.exp2(scores - shift[:, None])
    keep = tl.exp2(top - shift)
    total = total * keep + tl.sum(weights, 1)
    mixed = dot(narrow(weights, v.dtype), v, mixed * keep[:, None])
    return new_top, total, mixed


@triton.jit
def _fold_factors(top, split_top):
    """The new maximum of two softmax states, and by what each is to be scaled."""
    nothing = float("-inf")
    new_top = tl.maximum(top, split_top)
    shift = tl.where(new_top == nothing, 0.0, new_top)
    return new_top, tl.exp2(top - shift), tl.exp2(split_top - shift)


@triton.jit
def _fold(which, top, total, values, split_top, split_total, split_values):
    """Folds the present split of some queries into those before it, and begins the next."""
    new_top, keep, add = _fold_factors(top, split_top)
    folded = values * keep[:, None] + split_values * add[:, None]
    total = tl.where(which, total * keep + split_total * add, total)
    values = tl.where(which[:, None], folded, values)
    top = tl.where(which, new_top, top)
    split_top = tl.where(which, float("-inf"), split_top)
    split_total = tl.where(which, 0.0, split_total)
    split_values = tl.where(which[:, None], 0.0, split_values)
    return top, total, values, split_top, split_total, split_values


@triton.jit
def _load_keys_values(
    index, known, kv_head, block_table, k_cache, v_cache, k_block, k_head, k_slot, k_dim, v_block, v_head,
    v_slot, v_dim, dim, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Keys [dim, STEP] and values [STEP, dim] at indices of a sequence; where not known, of block 0."""
    block = tl.load(block_table + index // BLOCK, mask=known, other=0).to(tl.int64)
    k_at = block * k_block + (index % BLOCK) * k_slot + kv_head * k_head
    v_at = block * v_block + (index % BLOCK) * v_slot + kv_head * v_head
    from_k = k_cache + k_at[None, :] + dim[:, None] * k_dim
    from_v = v_cache + v_at[:, None] + dim[None, :] * v_dim
    if dim.shape[0] == HEAD_DIM:
        k = tl.load(from_k)
        v = tl.load(from_v)
    else:
        k = tl.load(from_k, mask=(dim < HEAD_DIM)[:, None], other=0.0)
        v = tl.load(from_v, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    return k, v


@triton.jit(do_not_specialize=[*OF_ROWS, "max_blocks"])
def _attend(
    qkv,
    k_cache,
    v_cache,
    out,
    positions,
    block_tables,
    tiles,
    tile_splits,
    partial_starts,
    items,
    num_items,
    forks,
    leaves,
    jumps,
    near,
    partial_tops,
    partial_totals,
    partial_values,
    scale,
    qkv_stride,
    max_blocks,
    k_block,
    k_head,
    k_slot,
    k_dim,
    v_block,
    v_head,
    v_slot,
    v_dim,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Items in turn, each for the query heads of one kv head and the rows of one tile.

    Positions where a row's path is in place are shared by the rows of the tile. From the step on where it is
    not, the row goes with a leaf below it, whose path is gathered by position.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    query = tl.arange(0, QUERIES)
    dim = tl.arange(0, PADDED_DIM)
    lane = tl.arange(0, STEP)
    work = tl.load(num_items) * NUM_KV_HEADS
    for job in range(tl.program_id(0), work, tl.num_programs(0)):
        item, kv_head = job // NUM_KV_HEADS, job % NUM_KV_HEADS
        tile = tl.load(items + item * 2)
        split = tl.load(items + item * 2 + 1)
        sequence = tl.load(tiles + tile * 4)
        first = tl.load(tiles + tile * 4 + 1)
        count = tl.load(tiles + tile * 4 + 2)
        block_table = block_tables + sequence.to(tl.int64) * max_blocks

        in_tile = query // GROUP
        head = kv_head * GROUP + query % GROUP
        valid = in_tile < count
        row = first + in_tile
        last = tl.load(positions + row, mask=valid, other=-1)
        low = tl.zeros_like(last)
        if WINDOW > 0:
            low = tl.maximum(last - (WINDOW - 1), 0)
        fork = tl.load(forks + row, mask=valid, other=NEVER)
        own = fork // STEP * STEP  # from here on it walks with its leaf
        leaf = tl.load(leaves + row, mask=valid, other=-1)

        begin = tl.min(tl.where(valid, low, NEVER), 0) // STEP * STEP
        limit = tl.max(last, 0) + 1
        if split >= 0:
            begin = tl.maximum(begin, _split_begin(split))
            limit = tl.minimum(limit, _split_begin(split + 1))

        # Of a split below the window nothing is computed, nor is anything of it read.
        if begin < limit:
            in_head = (valid[:, None]) & (dim < HEAD_DIM)[None, :]
            from_q = qkv + row.to(tl.int64)[:, None] * qkv_stride + head[:, None] * HEAD_DIM + dim[None, :]
            q = tl.load(from_q, mask=in_head, other=0.0)

            # The state of the present split, and that of those before it.
            split_top = tl.full([QUERIES], float("-inf"), tl.float32)
            split_total = tl.zeros([QUERIES], tl.float32)
            split_values = tl.zeros([QUERIES, PADDED_DIM], tl.float32)
            top = tl.full([QUERIES], float("-inf"), tl.float32)
            total = tl.zeros([QUERIES], tl.float32)
            values = tl.zeros([QUERIES, PADDED_DIM], tl.float32)

            shared = tl.minimum(tl.max(tl.minimum(last + 1, own), 0), limit)
            for base in range(begin, shared, STEP):
                if base % tl.where(base < FINE_END, FINE_SPLIT, COARSE_SPLIT) == 0:
                    # Of rows that went on elsewhere the split is not complete.
                    done = own >= base
                    top, total, values, split_top, split_total, split_values = _fold(
                        done, top, total, values, split_top, split_total, split_values
                    )
                position = base + lane
                k, v = _load_keys_values(
                    position, position < limit, kv_head, block_table, k_cache, v_cache, k_block, k_head,
                    k_slot, k_dim, v_block, v_head, v_slot, v_dim, dim, HEAD_DIM,
                )  # fmt: skip
                seen = (position[None, :] <= last[:, None]) & (position[None, :] >= low[:, None])
                seen = seen & (position[None, :] < own[:, None])
                split_top, split_total, split_values = _attend_step(
                    q, k, v, seen, split_top, split_total, split_values, scale
                )

            branches = tl.load(tiles + tile * 4 + 3)
            for node in range(first, first + count * branches):
                node_fork = tl.load(forks + node)
                is_leaf = (node_fork != NEVER) & (tl.load(leaves + node) == node)
                node_last = tl.load(positions + node)
                until = tl.where(is_leaf, tl.minimum(node_last + 1, limit), 0)
                mine = valid & (leaf == node)
                for base in range(tl.maximum(node_fork // STEP * STEP, begin), until, STEP):
                    if base % tl.where(base < FINE_END, FINE_SPLIT, COARSE_SPLIT) == 0:
                        top, total, values, split_top, split_total, split_values = _fold(
                            mine, top, total, values, split_top, split_total, split_values
                        )
                    ancestor = node
                    while tl.load(positions + ancestor) >= base + STEP:
                        ancestor = tl.load(jumps + ancestor)
                    position = base + lane
                    index = tl.load(
                        near + tl.cast(ancestor, tl.int64) * STEP + lane,
                        mask=(position >= node_fork) & (position <= node_last),
                        other=0,
                    )
                    index = tl.where(position < node_fork, position, index)
                    k, v = _load_keys_values(
                        index, position <= node_last, kv_head, block_table, k_cache, v_cache, k_block, k_head,
                        k_slot, k_dim, v_block, v_head, v_slot, v_dim, dim, HEAD_DIM,
                    )  # fmt: skip
                    seen = (position[None, :] <= last[:, None]) & (position[None, :] >= low[:, None])
                    split_top, split_total, split_values = _attend_step(
                        q, k, v, seen & mine[:, None], split_top, split_total, split_values, scale
                    )

            top, total, values, _, _, _ = _fold(
                query >= 0, top, total, values, split_top, split_total, split_values
            )
            if split < 0:
                to = out + (row.to(tl.int64) * NUM_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
                tl.store(to, narrow(values / _not_0(total)[:, None], q.dtype), mask=in_head)
            else:
                partial = tl.load(partial_starts + tile) + in_tile * tl.load(tile_splits + tile) + split
                at = partial.to(tl.int64) * NUM_HEADS + head
                tl.store(partial_tops + at, top, mask=valid)
                tl.store(partial_totals + at, total, mask=valid)
                tl.store(partial_values + at[:, None] * HEAD_DIM + dim[None, :], values, mask=in_head)


@triton.jit(do_not_specialize=[*OF_ROWS, "rows"])
def _fold_partials(
    out,
    positions,
    row_partials,
    partial_tops,
    partial_totals,
    partial_values,
    rows,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    PIECE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Folds the splits of divided rows in order, as a program does that has them all; PIECE heads in each."""
    at = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    row, head = at // NUM_HEADS, at % NUM_HEADS
    start = tl.load(row_partials + row, mask=row < rows, other=-1)
    there = start >= 0
    if tl.max(start, 0) >= 0:
        dim = tl.arange(0, PADDED_DIM)
        in_head = (dim < HEAD_DIM)[None, :]
        last = tl.load(positions + row, mask=there, other=-1)
        low = tl.zeros_like(last)
        if WINDOW > 0:
            low = tl.maximum(last - (WINDOW - 1), 0)
        first = tl.where(there, _split_of(low), NEVER)
        end = tl.where(there, _split_of(last) + 1, 0)
        top = tl.full([PIECE], float("-inf"), tl.float32)
        total = tl.zeros([PIECE], tl.float32)
        values = tl.zeros([PIECE, PADDED_DIM], tl.float32)
        for begin in range(tl.min(first, 0), tl.max(end, 0), AHEAD):
            for i in tl.static_range(AHEAD):  # so that several are on their way from memory at once
                split = begin + i
                computed = (first <= split) & (split < end)
                partial = (start + split).to(tl.int64) * NUM_HEADS + head
                split_top = tl.load(partial_tops + partial, mask=computed, other=float("-inf"))
                split_total = tl.load(partial_totals + partial, mask=computed, other=0.0)
                from_values = partial_values + (partial * HEAD_DIM)[:, None] + dim[None, :]
                split_values = tl.load(from_values, mask=computed[:, None] & in_head, other=0.0)
                top, keep, add = _fold_factors(top, split_top)
                total = total * keep + split_total * add
                values = values * keep[:, None] + split_values * add[:, None]
        to = out + (row.to(tl.int64) * NUM_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
        result = narrow(values / _not_0(total)[:, None], out.dtype.element_ty)
        tl.store(to, result, mask=there[:, None] & in_head)


class TritonAttention(LayerAttention):
    """Attention of one pass: rows are traced and the work is planned once, for all layers."""

    def __init__(self, heads: Heads, rope: RopeTable, eps: float, rows: Rows) -> None:
        self._heads, self._rope, self._eps, self._rows = heads, rope, eps, rows
        num_rows, num_sequences = len(rows.positions), len(rows.context_lens)
        group = heads.num_heads // heads.num_kv_heads
        self._queries = max(TILE, triton.next_power_of_2(group))
        self._tile_rows = self._queries // group
        self._padded_dim = max(16, triton.next_power_of_2(heads.head_dim))
        num_tiles = num_rows // self._tile_rows + num_sequences
        # A row's splits are bounded by its table: a tensor's shape, and not what it holds.
        max_splits = _max_splits(rows.block_tables.shape[1] * BLOCK_SIZE)
        partial_bytes = heads.num_heads * (heads.head_dim + 2) * 4
        self._max_partials = min(num_rows * max_splits, max(1, PARTIAL_BYTES // partial_bytes))
        self._workers = num_programs(rows.positions.device)

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=rows.positions.device)

        self._tiles, self._tile_splits = empty(num_tiles, 4), empty(num_tiles)
        self._forks, self._leaves, self._jumps = empty(num_rows), empty(num_rows), empty(num_rows)
        self._near = empty(num_rows, STEP.value)
        item_starts, self._partial_starts = empty(num_tiles), empty(num_tiles)
        self._num_items = empty(1)
        self._items = empty(num_tiles + self._max_partials, 2)
        self._row_partials = torch.full_like(rows.positions, -1)  # rows of no sequence are not folded
        padded = triton.next_power_of_2(self._tile_rows)
        _trace_paths[(num_tiles,)](
            rows.positions,
            rows.parents,
            rows.row_starts,
            rows.context_lens,
            self._tiles,
            self._tile_splits,
            self._forks,
            self._leaves,
            self._jumps,
            self._near,
            num_sequences,
            TILE_ROWS=self._tile_rows,
            PADDED=padded,
        )
        _plan_items[(1,)](
            self._tiles,
            self._tile_splits,
            item_starts,
            self._partial_starts,
            self._num_items,
            num_tiles,
            heads.num_kv_heads,
            self._workers,
            self._max_partials,
            PADDED=triton.next_power_of_2(num_tiles),
        )
        _list_items[(num_tiles,)](
            self._tiles,
            self._tile_splits,
            item_starts,
            self._partial_starts,
            self._items,
            self._row_partials,
            PADDED=padded,
            num_warps=1,
        )

    def __call__(
        self,
        qkv: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        window: int | None,
    ) -> torch.Tensor:
        """See `LayerAttention`."""
        heads, rows = self._heads, self._rows
        num_rows, head_dim, is_wide = len(qkv), heads.head_dim, self._padded_dim > 128
        out = qkv.new_empty((num_rows, heads.num_heads * head_dim))
        # Blocks, heads, slots, dims: keys lie as `new_cache` has put them.
        k_strides = tuple(k_cache.stride(i) for i in (0, 1, 3, 2))
        shape = {"NUM_HEADS": heads.num_heads, "HEAD_DIM": head_dim}
        normed = q_norm is not None and k_norm is not None
        work = num_rows * (heads.num_heads + 2 * heads.num_kv_heads)
        _norm_rope_cache[(triton.cdiv(work, HEADS_PIECE),)](
            qkv,
            k_cache,
            v_cache,
            rows.positions,
            rows.slots,
            self._rope.cos_sin,
            q_norm if normed else qkv,
            k_norm if normed else qkv,
            self._eps,
            num_rows,
            qkv.stride(0),
            *k_strides,
            *v_cache.stride()[:4],
            **shape,
            NUM_KV_HEADS=heads.num_kv_heads,
            PADDED_HALF=triton.next_power_of_2(head_dim // 2),
            PIECE=HEADS_PIECE,
            NORMED=normed,
            **EXACT,
        )
        states = torch.empty(
            self._max_partials, heads.num_heads, head_dim + 2, dtype=torch.float32, device=qkv.device
        ).view(-1)
        num_states = self._max_partials * heads.num_heads
        tops, totals, values = states.split([num_states, num_states, num_states * head_dim])
        _attend[(self._workers,)](
            qkv,
            k_cache,
            v_cache,
            out,
            rows.positions,
            rows.block_tables,
            self._tiles,
            self._tile_splits,
            self._partial_starts,
            self._items,
            self._num_items,
            self._forks,
            self._leaves,
            self._jumps,
            self._near,
            tops,
            totals,
            values,
            head_dim**-0.5 * 1.4426950408889634,  # powers of 2 are what the hardware has
            qkv.stride(0),
            rows.block_tables.stride(0),
            *k_strides,
            *v_cache.stride()[:4],
            **shape,
            NUM_KV_HEADS=heads.num_kv_heads,
            PADDED_DIM=self._padded_dim,
            QUERIES=self._queries,
            WINDOW=window or 0,
            num_warps=8 if is_wide else 4,
            num_stages=1 if qkv.dtype == torch.float32 else 2 if is_wide else 3,  # what shared memory holds
            **EXACT,
        )
        _fold_partials[(triton.cdiv(num_rows * heads.num_heads, FOLD_PIECE),)](
            out,
            rows.positions,
            self._row_partials,
            tops,
            totals,
            values,
            num_rows,
            **shape,
            PADDED_DIM=self._padded_dim,
            WINDOW=window or 0,
            PIECE=FOLD_PIECE,
            AHEAD=8,
            num_warps=1,
            **EXACT,
        )
        return out


def _max_splits(positions: int) -> int:
    """Splits of a row that sees so many positions: `_split_of` on the host."""
    fine = triton.cdiv(min(positions, FINE_END.value), FINE_SPLIT.value)
    return int(fine + triton.cdiv(max(0, positions - FINE_END.value), COARSE_SPLIT.value))
