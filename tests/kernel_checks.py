"""What every backend of kernels is held to, against plain torch on the CPU; tests say with which sizes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

from outpace.kernels import EarlyExit, Heads, Kernels, RopeTable, Rows, TokenChange, move_slots, new_cache
from outpace.kernels.reference import ReferenceKernels
from outpace.models.config import RopeConfig
from outpace.models.decoder import rope_table

BLOCK = 16
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
TREE = [-1, 0, 0, 1, 1, 2, 3]
GROUPED = Heads(6, 2, 32)
Sequences = list[tuple[int, list[int]]]


def random_like(*shape: int, dtype: torch.dtype, seed: int = 0, device: torch.device = CPU) -> torch.Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def chain(length: int) -> list[int]:
    return list(range(-1, length - 1))


def lay_out(sequences: Sequences, num_blocks: int, seed: int = 0, device: torch.device = CPU) -> Rows:
    """Rows of sequences given as (context length, parents of the step's rows), in shuffled cache blocks."""
    free = list(range(num_blocks))
    random.Random(seed).shuffle(free)
    positions, slots, parents, starts, tables, branching = [], [], [], [0], [], []
    for context, path in sequences:
        blocks = [free.pop() for _ in range((context + len(path) + BLOCK - 1) // BLOCK)]
        depth: list[int] = []
        for row, parent in enumerate(path):
            depth.append(0 if parent < 0 else depth[parent] + 1)
            logical = context + row
            slots.append(blocks[logical // BLOCK] * BLOCK + logical % BLOCK)
        positions += [context + d for d in depth]
        parents += path
        starts.append(starts[-1] + len(path))
        tables.append(blocks)
        branching.append(int(any(parent != row - 1 for row, parent in enumerate(path))))
    widest = max(map(len, tables))

    def int32(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return Rows(
        positions=int32(positions),
        slots=int32(slots),
        parents=int32(parents),
        row_starts=int32(starts),
        context_lens=int32([context for context, _ in sequences]),
        block_tables=int32([t + [0] * (widest - len(t)) for t in tables]),
        branching=int32(branching),
    )


def attend(
    kernels: Kernels,
    heads: Heads,
    rows: Rows,
    qkv: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    window: int | None,
    norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """One layer's attention; `qkv` stays as it is."""
    rope = RopeTable(rope_table(RopeConfig(), heads.head_dim, 8192).to(qkv.device))
    return kernels.attention(heads, rope, 1e-5, rows)(qkv.clone(), *caches, norm, norm, window)


def attention_agrees(
    kernels: Kernels,
    sequences: Sequences,
    heads: Heads,
    dtype: torch.dtype,
    window: int | None,
    normed: bool,
    device: torch.device = CPU,
) -> None:
    """Output and cache are those of the reference."""
    num_blocks = sum((context + len(path)) // BLOCK + 1 for context, path in sequences)
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    num_rows = sum(len(path) for _, path in sequences)
    keys = random_like(num_blocks, heads.num_kv_heads, heads.head_dim, BLOCK, dtype=dtype, seed=1)
    values = random_like(num_blocks, heads.num_kv_heads, BLOCK, heads.head_dim, dtype=dtype, seed=2)
    results = []
    for backend, where in ((kernels, device), (ReferenceKernels(), CPU)):
        shape = (1, num_blocks, heads.num_kv_heads)
        k_cache, v_cache = new_cache(shape, heads.head_dim, dtype, where, backend.cache_group)
        caches = (k_cache[0].copy_(grouped(keys, k_cache)), v_cache[0].copy_(grouped(values, v_cache)))
        norm = random_like(heads.head_dim, dtype=dtype, seed=3, device=where) if normed else None
        rows = lay_out(sequences, num_blocks, device=where)
        qkv = random_like(num_rows, width, dtype=dtype, device=where)
        out = attend(backend, heads, rows, qkv, caches, window, norm)
        results.append([x.cpu().float() for x in (out, *map(ungrouped, caches))])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def grouped(tensor: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """Keys [..., head_dim, 16] or values [..., 16, head_dim] as a cache has them."""
    width, group = tensor.shape[-2], cache.shape[-1]
    return tensor.reshape(*tensor.shape[:-2], width // group, group, -1).transpose(-1, -2)


def ungrouped(cache: torch.Tensor) -> torch.Tensor:
    """The reverse."""
    return cache.transpose(-1, -2).flatten(-3, -2)


def rows_attend_to_the_same_bits(
    kernels: Kernels,
    dtype: torch.dtype,
    window: int | None,
    alone_at: Iterable[int],
    heads: Heads = GROUPED,
    device: torch.device = CPU,
    num_random: int = 24,
) -> None:
    """A row's bits are the same alone, in a chunk, beside others and on the paths of trees."""
    total, num_blocks = 300, 96
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    tokens = random_like(total, width, dtype=dtype, device=device)
    noise = random_like(64, width, dtype=dtype, seed=9, device=device)

    def cache(filled: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (1, num_blocks, heads.num_kv_heads)
        keys, values = new_cache(shape, heads.head_dim, dtype, device, kernels.cache_group)
        caches = (keys[0], values[0])
        if filled:
            run([(0, chain(filled))], tokens[:filled], caches)
        return caches

    def run(
        sequences: Sequences, qkv: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        return attend(kernels, heads, lay_out(sequences, num_blocks, device=device), qkv, caches, window)

    caches = cache()
    whole = run([(0, chain(total))], tokens, caches)
    # In order, so that where every position is asked for each is computed on what the ones before have left.
    caches = cache() if len(list(alone_at)) == total else caches
    for p in alone_at:
        assert torch.equal(run([(p, [-1])], tokens[p : p + 1], caches)[0], whole[p]), f"alone at {p}"

    beside = [(250, chain(50)), (0, chain(64))]  # a chunk beside another sequence
    assert torch.equal(run(beside, torch.cat((tokens[250:], noise)), cache(250))[:50], whole[250:])

    filled = cache(total)  # what stands behind a tree's context is not to be seen
    for start, parents, path in trees(total, num_random):
        qkv = noise[torch.arange(len(parents)) % len(noise)]  # wrong guesses, but on one path
        qkv[path] = tokens[start : start + len(path)]
        on_tree = run([(start, parents)], qkv, (filled[0].clone(), filled[1].clone()))
        assert torch.equal(on_tree[path], whole[start : start + len(path)]), (start, parents, path)


def trees(total: int, num_random: int) -> Iterator[tuple[int, list[int], list[int]]]:
    """Trees below sequences of up to `total` tokens: context, parents, and the rows of a path from the root.

    Some are known: one across a chunk's border and behind it, and a chain across blocks that branches off
    where it began. The others are random, some of them nearly chains.
    """
    yield 253, [-1, 0, 0, 1, 2, 4, 5], [0, 2, 4, 5, 6]
    yield 290, [-1, 0, 0, 1, 2, 4, 5], [0, 2, 4, 5, 6]
    yield 290, [*range(-1, 21), 1, 22, 0], [0, 1, 22, 23]
    rng = random.Random(0)
    for _ in range(num_random):
        branches, size = rng.random(), rng.randrange(2, 48)
        parents = [row if rng.random() > branches else rng.randrange(row + 1) for row in range(size)]
        parents = [-1, *parents]
        path = [rng.randrange(len(parents))]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        yield rng.randrange(total - len(path) + 1), parents, path


def slots_move(kernels: Kernels, dtype: torch.dtype) -> None:
    """Slots are copied as torch copies them, those that are read and written, too."""
    cache = new_cache((3, 4, 2), 32, dtype, group=kernels.cache_group)
    for of in cache:
        of.normal_(generator=torch.Generator().manual_seed(0))
    moved, expected = ([of.clone() for of in cache] for _ in range(2))
    moves = [(20, 3), (21, 20), (63, 21), (5, 62)]
    kernels.move_slots(moved[0], moved[1], moves)
    move_slots(expected[0], expected[1], moves)
    for ours, theirs, before in zip(moved, expected, cache, strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, before)


def row_kernels_agree(kernels: Kernels, dtype: torch.dtype, rows: int, device: torch.device = CPU) -> None:
    """Norms and activation are those of the reference."""
    slow = ReferenceKernels()
    x, delta = random_like(rows, 576, dtype=dtype), random_like(rows, 576, dtype=dtype, seed=1)
    weight = random_like(576, dtype=dtype, seed=2)
    there = [t.to(device) for t in (x, delta, weight)]
    close: Any = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    fast = kernels.rms_norm(there[0], there[2], 1e-5)
    torch.testing.assert_close(fast.cpu(), slow.rms_norm(x, weight, 1e-5), **close)
    residuals = (there[0].clone(), x.clone())
    fast = kernels.add_rms_norm(there[1], residuals[0], there[2], 1e-5)
    torch.testing.assert_close(fast.cpu(), slow.add_rms_norm(delta, residuals[1], weight, 1e-5), **close)
    assert torch.equal(residuals[0].cpu(), residuals[1])
    torch.testing.assert_close(kernels.silu_mul(there[0] * 8).cpu(), slow.silu_mul(x * 8), **close)


def linear_rows_have_the_same_bits(
    kernels: Kernels,
    dtype: torch.dtype,
    shape: tuple[int, int],
    counts: Iterable[int],
    device: torch.device = CPU,
) -> None:
    """A row of a linear layer has the same bits whatever rows there are before and behind it."""
    linear = kernels.linear(random_like(*shape, dtype=dtype, device=device))
    x = random_like(130, shape[1], dtype=dtype, seed=1, device=device)
    x[::3] *= 1e-38  # some processors' instructions take such numbers for 0
    whole = linear(x)
    for rows in counts:
        assert torch.equal(linear(x[:rows].contiguous()), whole[:rows]), f"{rows} rows"
        last = x[130 - rows :].contiguous()
        assert torch.equal(linear(last), whole[130 - rows :]), f"the last {rows} rows"
    assert linear(x[:0]).shape == (0, shape[0])


def linear_agrees_with_the_exact_product(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int], has_bias: bool, device: torch.device = CPU
) -> None:
    """The error is that of float32 sums in any order."""
    weight, x = random_like(*shape, dtype=dtype), random_like(29, shape[1], dtype=dtype, seed=1)
    bias = random_like(shape[0], dtype=dtype, seed=2) if has_bias else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    linear = kernels.linear(weight.to(device), None if bias is None else bias.to(device))
    error = linear(x.to(device)).cpu().double() - exact
    sums = (x.double().abs() @ weight.double().abs().T) * shape[1] * torch.finfo(torch.float32).eps
    assert (error.abs() <= sums + exact.abs() * torch.finfo(dtype).eps).all()


def noisy_argmax_agrees(
    kernels: Kernels, dtype: torch.dtype, rows: int, vocab: int, device: torch.device = CPU
) -> None:
    """Chosen tokens are those of the reference, with noise and without."""
    logits = random_like(rows, vocab, dtype=dtype) * 3
    logits[2, :] = 0.0  # all equal: greedy takes the first token
    logits[3, :] = -torch.inf
    logits[3, vocab - 1] = 0.0
    seeds, positions = torch.arange(rows) * 7919 - 1000, torch.arange(rows)
    for noisy in (torch.zeros(rows, dtype=torch.bool), torch.ones(rows, dtype=torch.bool)):
        given = (logits, seeds, positions, noisy)
        fast = kernels.noisy_argmax(*(tensor.to(device) for tensor in given)).cpu()
        assert torch.equal(fast, ReferenceKernels().noisy_argmax(*given))
        assert fast[3] == vocab - 1
        assert noisy.any() or fast[2] == 0


def noisy_topk_agrees(kernels: Kernels, dtype: torch.dtype, rows: int, vocab: int) -> None:
    """Ranked tokens and their probabilities are those of choosing one after the other by the reference."""
    logits = random_like(rows, vocab, dtype=dtype) * 3
    logits[2, :] = 0.0  # all equal: without noise the first tokens
    logits[3, :] = -torch.inf
    logits[3, [vocab - 1, 5]] = 0.0  # fewer than are asked for
    seeds, positions = torch.arange(rows) * 7919 - 1000, torch.arange(rows)
    for noisy in (torch.zeros(rows, dtype=torch.bool), torch.ones(rows, dtype=torch.bool)):
        keys, before = (seeds, positions, noisy), logits.clone()
        ids, probs = kernels.noisy_topk(logits, 6, *keys)
        assert torch.equal(logits, before)
        expected_ids, expected_probs = ReferenceKernels().noisy_topk(logits, 6, *keys)
        assert torch.equal(ids, expected_ids)
        assert torch.allclose(probs, expected_probs, rtol=1e-5, atol=0)
        assert ids[:, :1].squeeze(1).equal(kernels.noisy_argmax(logits, *keys))
        assert probs[3].tolist() == [0.5, 0.5, 0, 0, 0, 0]
        assert noisy.any() or ids[2].tolist() == [0, 1, 2, 3, 4, 5]


def stream_heads_agree(kernels: Kernels, dtype: torch.dtype, hidden: int, rank: int, tokens: int) -> None:
    """What is worked out for streams beside a pass is what torch makes of it, of each anchor alone."""
    anchors, streams, vocab, reference = 5, 3, 64, ReferenceKernels()
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    of_tokens = [drawn(vocab, rank, dtype=torch.float32) for _ in range(2)]
    change = TokenChange(*(drawn(rank, hidden, scale=0.1) for _ in range(3)), *of_tokens)
    states, embeddings = drawn(anchors, streams, hidden), drawn(anchors, hidden)
    found, expected = states.clone(), states.clone()
    units = kernels.change_first_(change, found, embeddings)
    close(units, reference.change_first_(change, expected, embeddings), 1e-4)
    close(found, expected, 1e-4 if dtype is torch.float32 else 1e-2)
    assert not torch.equal(found, states)

    sources, rows = torch.tensor([0, 1, 1, 1, 2, 4, 4, 4]), torch.tensor([1, 2, 3, 5, 6, 7])
    started = kernels.start_streams(embeddings, sources, rows, states[0])
    assert torch.equal(started, reference.start_streams(embeddings, sources, rows, states[0]))
    assert torch.equal(started[[0, 4]], embeddings[[0, 2]])
    assert torch.equal(started[6], embeddings[4] + states[0, 1])

    places = torch.rand(anchors, streams, vocab, generator=generator).argsort(-1)[..., :tokens].contiguous()
    probs = torch.rand(anchors, streams, tokens, generator=generator)
    probs /= probs.sum(-1, keepdim=True) * torch.tensor([1.5, 1.0, 9.0, 1.1, 2.0]).view(-1, 1, 1)
    probs[1, :, -1], places[1, :, -1], probs[2, 1] = 0.0, -1, 0.0  # fewer that are possible, and none
    temperature = torch.tensor([1.0, 0.5, 0.7, 1.0, 2.0])
    index, chances = kernels.likeliest_behind(change, units, places, probs, temperature, 4)
    expected_index, expected_chances = reference.likeliest_behind(
        change, units, places, probs, temperature, 4
    )
    close(chances, expected_chances, 1e-4)
    assert torch.equal(index[chances > 0], expected_index[chances > 0])
    assert not chances[2, 1].any()
    assert chances[:, 1:].std(2).max() > 0.01, "the token before matters"

    down, up, bias = (drawn(*shape, hidden, dtype=torch.float32, scale=0.1) for shape in ((8,), (8,), ()))
    weights = EarlyExit(down, up, bias, torch.tensor([0.5, 0.2, 0.0]), drawn(vocab, hidden))
    x = states.view(-1, hidden)
    tokens_of = (torch.tensor([3, 0, 3, 11]), torch.tensor([5, 63, 0, 5]), torch.tensor([0.5, 0.0, 1.0, 0.1]))
    exits = kernels.exit_probs(weights, x, *tokens_of)
    close(exits, reference.exit_probs(weights, x, *tokens_of), 1e-3)
    assert exits.std() > 0.1

    for anchor in range(anchors):
        alone = slice(anchor, anchor + 1)
        state = states[alone].clone()
        assert torch.equal(kernels.change_first_(change, state, embeddings[alone]), units[alone])
        assert torch.equal(state, found[alone])
        given = (units[alone], places[alone], probs[alone], temperature[alone])
        _, one = kernels.likeliest_behind(change, *given, 4)
        assert torch.equal(one, chances[alone])

    head, table = kernels.linear(drawn(vocab, hidden)), drawn(vocab, hidden)
    which, before = torch.tensor([3, 0, 4, 3]), torch.tensor([7, 63, 0, 7])
    at_once, one_by_one = (
        candidates(change, head, states, which, table, before, tokens, 2)
        for candidates in (kernels.stream_candidates, partial(Kernels.stream_candidates, kernels))
    )
    assert all(torch.equal(*pair) for pair in zip(at_once, one_by_one, strict=True))
    assert not torch.equal(at_once[0][0], at_once[0][1])


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Alike but for the order of sums, and as many roundings."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def filters_agree(kernels: Kernels, rows: int, vocab: int, device: torch.device = CPU) -> None:
    """What stays is what the reference keeps."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits[::7] = logits[::7].round()  # many ties
    logits[1, 1:] = -torch.inf
    top_k = torch.randint(0, 50, (rows,), generator=generator)
    top_p = torch.rand(rows, generator=generator).clamp(min=0.01)
    min_p = torch.rand(rows, generator=generator) * 0.3
    top_k[::3], top_p[1::3], min_p[2::3] = 0, 1.0, 0.0
    limits = (top_k, top_p, min_p)
    fast, slow = logits.to(device, copy=True), logits.clone()
    kernels.filter_logits_(fast, *(limit.to(device) for limit in limits))
    ReferenceKernels().filter_logits_(slow, *limits)
    assert torch.equal(fast.cpu(), slow)
    assert (slow > -torch.inf).any(dim=1).all()
