"""From logits to the target distribution and to a token, against slow references written to be read."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from outpace import sampling
from outpace.errors import InvalidRequestError
from outpace.kernels.reference import ReferenceKernels
from outpace.kernels.reference_sampling import (
    best_tokens,
    filter_logits_,
    gumbel_noise,
    hash_tokens,
    noisy_argmax,
)
from outpace.request import Request, Sequence, TokenLogprob
from outpace.sampling import SampleRow, SamplingParams, token_logprobs

KERNELS = ReferenceKernels()
target_logits = functools.partial(sampling.target_logits, kernels=KERNELS)
choose = functools.partial(sampling.choose, kernels=KERNELS)

VOCAB = 61
EOS = 1
INF = math.inf


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """In bfloat16, whose 8 bits of mantissa make ties common."""
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)).mul(3).bfloat16()


def sequence(
    params: SamplingParams,
    answer: tuple[int, ...] = (),
    prompt: tuple[int, ...] = (3, 4),
    bad_words: tuple[tuple[int, ...], ...] = (),
    seed: int = 7,
) -> Sequence:
    params = replace(params, bad_words=tuple("w" for _ in bad_words))
    request = Request("r", prompt, params, seed, 100, frozenset({EOS}), bad_words)
    return Sequence(request, [*prompt, *answer])


def row_of(params: SamplingParams, answer: tuple[int, ...] = (), **more: object) -> SampleRow:
    return SampleRow(sequence(params, answer, **more))  # type: ignore[arg-type]


def kept(row: torch.Tensor) -> set[int]:
    return set((row > -INF).nonzero().squeeze(1).tolist())


# ---- Filters ----


def slow_filter(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """One rule after the other, on (probability, token) pairs."""
    ranked = sorted((t for t in range(len(logits)) if logits[t] > -INF), key=lambda t: (-logits[t], t))
    best = logits[ranked[0]]
    if top_k > 0:
        ranked = ranked[:top_k]
    weights = {t: math.exp(float(logits[t]) - float(best)) for t in ranked}
    total, above = sum(weights.values()), 0.0
    nucleus = []
    for t in ranked:
        if top_p == 1 or above < float(np.float32(top_p)) * total:
            nucleus.append(t)
        above += weights[t]
    return {t for t in nucleus if weights[t] >= float(np.float32(min_p)) * (1 - 1e-12)}


def filtered(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    out = logits.float().clone()
    rows = len(out)
    filter_logits_(out, torch.full((rows,), top_k), torch.full((rows,), top_p), torch.full((rows,), min_p))
    return out


@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 7, VOCAB, VOCAB + 5])
def test_filters_keep_what_their_rules_say(top_k: int, top_p: float, min_p: float) -> None:
    logits = random_logits(12, seed=top_k).float()
    logits[::3] = logits[::3].round()  # many ties
    logits[1::3, ::2] = -INF
    out = filtered(logits, top_k, top_p, min_p)
    for before, after in zip(logits, out, strict=True):
        expected = slow_filter(before.numpy(), top_k, top_p, min_p)
        assert kept(after) == expected
        ids = sorted(expected)
        assert torch.equal(after[ids], before[ids])


def test_each_row_has_its_own_limits() -> None:
    logits = random_logits(4).float()
    limits = [(3, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (0, 1.0, 0.0)]
    out = logits.clone()
    k, p, m = (torch.tensor(column) for column in zip(*limits, strict=True))
    filter_logits_(out, k, p, m)
    for before, after, limit in zip(logits, out, limits, strict=True):
        assert kept(after) == slow_filter(before.numpy(), *limit)
    assert torch.equal(out[3], logits[3])


def test_equal_logits_are_cut_at_the_higher_token_ids() -> None:
    flat = torch.zeros(1, 10)
    assert kept(filtered(flat, top_k=3)[0]) == {0, 1, 2}
    assert kept(filtered(flat, top_p=0.35)[0]) == {0, 1, 2, 3}
    assert kept(filtered(flat, top_p=0.5)[0]) == {0, 1, 2, 3, 4}  # which reach one half exactly
    assert kept(filtered(flat, min_p=1.0)[0]) == set(range(10))


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept(filtered(logits, top_p=0.55)[0]) == {0, 1}
    assert kept(filtered(logits, top_k=2, top_p=0.55)[0]) == {0}  # 0.4 / 0.7


def test_the_best_token_survives_the_strictest_limits() -> None:
    logits = random_logits(20)
    out = filtered(logits, top_k=1, top_p=1e-9, min_p=1.0)
    assert [kept(row) for row in out] == [{int(t)} for t in logits.max(dim=-1).indices]


def test_the_best_tokens_come_in_rank_order() -> None:
    row = torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0, -INF])
    assert best_tokens(row, 4).tolist() == [1, 3, 2, 4]
    assert best_tokens(row, 6).tolist() == [1, 3, 2, 4, 0, 5]
    assert best_tokens(row, 0).tolist() == []


# ---- Noise ----


def slow_hash(seed: int, position: int, token: int) -> int:
    """The hash in Python's own integers."""
    m64, m32 = (1 << 64) - 1, (1 << 32) - 1
    z = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & m64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & m64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & m64
    z ^= z >> 31
    x = (token * 0x9E3779B9 & m32) ^ (z & m32)
    x ^= x >> 16
    x = x * 0x21F0AAAD & m32
    x ^= x >> 15
    x = (x + (z >> 32)) & m32
    x = x * 0x735A2D97 & m32
    x ^= x >> 15
    x = x * 0x85EBCA6B & m32
    return x ^ x >> 13


def test_the_hash_is_the_one_documented() -> None:
    seeds, positions = [0, 1, -1, 2**63 - 1, -(2**63), 987654321], [0, 5, 31, 1, 100_000, 2**31]
    got = hash_tokens(torch.tensor(seeds), torch.tensor(positions), 50)
    want = [[slow_hash(s, p, t) for t in range(50)] for s, p in zip(seeds, positions, strict=True)]
    assert got.tolist() == want


def test_the_noise_of_a_seed_stays_the_same_between_versions() -> None:
    assert hash_tokens(torch.tensor(42), torch.tensor(7), 3).tolist() == [2059405389, 1606300858, 550967133]


def test_noise_is_the_gumbel_quantile_of_the_hash() -> None:
    noise = gumbel_noise(torch.tensor(42), torch.tensor(7), 200_000)
    uniform = [(slow_hash(42, 7, t) + 0.5) / 2**32 for t in range(200_000)]
    expected = -np.log(-np.log1p(-np.array(uniform)))
    np.testing.assert_allclose(noise.numpy(), expected, rtol=1e-6)
    assert hash_tokens(torch.tensor(42), torch.tensor(7), 3).tolist() == [
        slow_hash(42, 7, t) for t in range(3)
    ]


def test_noise_is_finite_at_both_ends_of_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([0, 2**32 - 1])
    monkeypatch.setattr("outpace.kernels.reference_sampling.hash_tokens", lambda *_: ends)
    noise = gumbel_noise(torch.tensor(0), torch.tensor(0), 2).tolist()
    assert noise == pytest.approx([22.87, -3.13], abs=0.01)


def test_a_choice_depends_on_seed_position_and_logits_only() -> None:
    logits = random_logits(1).float().expand(64, -1).contiguous()
    everything = torch.ones(64, dtype=torch.bool)
    seeds, positions = torch.arange(64) % 8, torch.arange(64) // 8
    chosen = noisy_argmax(logits, seeds, positions, everything)
    assert torch.equal(chosen, noisy_argmax(logits, seeds, positions, everything))
    for row in range(0, 64, 5):
        alone = noisy_argmax(
            logits[row : row + 1], seeds[row : row + 1], positions[row : row + 1], everything[:1]
        )
        assert alone.item() == chosen[row]
    assert len(set(chosen[:8].tolist())) > 1  # seeds differ
    assert len(set(chosen[::8].tolist())) > 1  # positions differ


def test_a_bfloat16_row_is_chosen_from_like_its_float32_copy() -> None:
    logits = random_logits(32)
    seeds, positions = torch.arange(32), torch.arange(32)
    noisy = torch.arange(32) % 2 == 0
    chosen = noisy_argmax(logits, seeds, positions, noisy)
    assert torch.equal(chosen, noisy_argmax(logits.float(), seeds, positions, noisy))
    assert torch.equal(chosen[1::2], best_of(logits[1::2]))


def best_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor([min(range(VOCAB), key=lambda t: (-row[t], t)) for row in logits.float().tolist()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_noise_ties_go_to_the_lowest_token_id(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0], [-INF, -INF, -3.0]], dtype=dtype)
    none = torch.zeros(3, dtype=torch.bool)
    assert noisy_argmax(logits, torch.zeros(3).long(), torch.zeros(3).long(), none).tolist() == [1, 0, 2]


def test_a_forbidden_token_is_never_chosen() -> None:
    logits = torch.full((500, VOCAB), -INF)
    logits[:, 17] = -80.0
    chosen = noisy_argmax(logits, torch.arange(500), torch.arange(500), torch.ones(500, dtype=torch.bool))
    assert (chosen == 17).all()


# ---- The target distribution ----


def slow_target(logits: torch.Tensor, row: SampleRow) -> dict[int, float]:
    """Token -> target logit for the tokens that remain, with one dictionary and no tensor."""
    params, request = row.params, row.sequence.request
    history = [*row.sequence.token_ids, *row.drafted]
    answer = history[len(request.prompt_ids) :]
    scores = dict(enumerate(logits.float().tolist()))
    for token in set(history):
        score, penalty = scores[token], params.repetition_penalty
        scores[token] = score / penalty if score > 0 else score * penalty
    for token, count in Counter(answer).items():
        scores[token] -= params.frequency_penalty * count + params.presence_penalty
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if params.allowed_token_ids is not None:
        scores = {token: scores[token] for token in params.allowed_token_ids}
    for *start, last in request.bad_words_ids:
        if len(start) <= len(answer) and answer[len(answer) - len(start) :] == start:
            scores.pop(last, None)
    if len(answer) < params.min_tokens:
        for token in request.eos_token_ids | set(params.stop_token_ids):
            scores.pop(token, None)
    if params.temperature == 0:
        return scores
    dense = np.full(len(logits), -INF)
    for token, score in scores.items():
        dense[token] = score / params.temperature
    return {t: dense[t] for t in slow_filter(dense, max(params.top_k, 0), params.top_p, params.min_p)}


def random_row(rng: random.Random) -> SampleRow:
    """A row of which each parameter is used by about a third."""

    def some(make: Callable[[], Any], otherwise: Any) -> Any:
        return make() if rng.random() < 0.35 else otherwise

    tokens = range(VOCAB)
    params = SamplingParams(
        temperature=some(lambda: 0.0, rng.choice([0.3, 0.8, 1.0, 1.7])),
        top_p=some(lambda: rng.choice([0.9, 0.5]), 1.0),
        top_k=some(lambda: rng.choice([-1, 1, 20]), 0),
        min_p=some(lambda: rng.choice([0.02, 0.2]), 0.0),
        presence_penalty=some(lambda: rng.choice([-1.5, 0.7]), 0.0),
        frequency_penalty=some(lambda: rng.choice([-0.5, 1.1]), 0.0),
        repetition_penalty=some(lambda: rng.choice([0.8, 1.3]), 1.0),
        logit_bias=some(lambda: {t: rng.uniform(-9, 9) for t in rng.sample(tokens, 4)}, {}),
        stop_token_ids=(2,),
        min_tokens=some(lambda: 8, 0),
        allowed_token_ids=some(lambda: tuple(rng.sample(tokens, 40)), None),
    )
    answer = tuple(rng.choices(range(12), k=rng.randrange(9)))
    drafted = tuple(rng.choices(range(12), k=rng.randrange(4)))
    words = tuple(
        tuple(rng.choices(range(12), k=rng.choice([1, 2, 3]))) for _ in range(rng.choice([0, 0, 6]))
    )
    prompt = tuple(rng.choices(tokens, k=5))
    return SampleRow(sequence(params, answer, prompt, words, seed=rng.getrandbits(63)), drafted)


def test_target_logits_are_those_of_the_slow_reference() -> None:
    rng = random.Random(0)
    rows = [random_row(rng) for _ in range(300)]
    logits = random_logits(300)
    for row, before, after in zip(rows, logits, target_logits(logits, rows), strict=True):
        expected = slow_target(before, row)
        assert kept(after) == set(expected)
        for token, value in expected.items():
            assert after[token].item() == pytest.approx(value, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(dtype: torch.dtype) -> None:
    rng = random.Random(1)
    plain = [SampleRow(sequence(SamplingParams(temperature=0), seed=i)) for i in range(20)]
    rows = [*plain, *(random_row(rng) for _ in range(60))]
    rng.shuffle(rows)
    logits = random_logits(len(rows)).to(dtype)
    together = target_logits(logits, rows)
    chosen = choose(together, rows)
    for size in (1, 2, 7):
        for _ in range(40):
            picked = rng.sample(range(len(rows)), size)
            few = [rows[i] for i in picked]
            apart = target_logits(logits[picked], few)
            assert torch.equal(apart.float(), together[picked])
            assert choose(apart, few) == [chosen[i] for i in picked]


def test_rows_without_wishes_get_the_models_own_logits() -> None:
    logits = random_logits(3)
    rows = [row_of(SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1), (9, 9)) for _ in range(3)]
    assert target_logits(logits, rows) is logits
    assert choose(logits, rows) == best_of(logits).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_logits_are_never_modified(dtype: torch.dtype) -> None:
    logits = random_logits(1).to(dtype)
    before = logits.clone()
    row = row_of(SamplingParams(presence_penalty=2, logit_bias={5: -100}, top_k=2, min_tokens=3), (5, 6))
    target_logits(logits, [row], allowed=torch.ones(1, VOCAB, dtype=torch.bool))
    assert torch.equal(logits, before)


def test_drafted_ancestors_count_as_part_of_the_answer() -> None:
    params = SamplingParams(
        temperature=0, repetition_penalty=1.3, presence_penalty=1, frequency_penalty=0.5, min_tokens=4
    )
    logits, words = random_logits(1), ((8, 9, 10), (9, 10, 20), (10,), (5, 8, 9, 10, 30))
    drafted = SampleRow(sequence(params, (5, 8), bad_words=words), (9, 10))
    known = SampleRow(sequence(params, (5, 8, 9, 10), bad_words=words))
    assert drafted.position == known.position == 6
    assert torch.equal(target_logits(logits, [drafted]), target_logits(logits, [known]))


def test_rows_of_different_sequences_do_not_share_their_history() -> None:
    params, logits = SamplingParams(temperature=0, repetition_penalty=2.0), torch.ones(3, VOCAB)
    first, second = sequence(params, (10,)), sequence(params, (20,))
    rows = [SampleRow(first), SampleRow(second, (30,)), SampleRow(second)]
    lowered = [set((row < 1).nonzero().squeeze(1).tolist()) for row in target_logits(logits, rows)]
    assert lowered == [{3, 4, 10}, {3, 4, 20, 30}, {3, 4, 20}]


def test_presence_and_frequency_look_at_the_answer_only() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    target = target_logits(torch.zeros(1, VOCAB), [row_of(params, (7, 7, 8))])[0]
    assert {t: v for t, v in enumerate(target.tolist()) if v} == {7: -1.0, 8: -0.75}


def test_a_bad_word_is_forbidden_only_where_it_would_be_completed() -> None:
    params, words = SamplingParams(temperature=0), ((10, 11), (12,), (3, 4, 13))
    logits = torch.zeros(1, VOCAB)

    def forbidden(*answer: int) -> set[int]:
        target = target_logits(logits, [row_of(params, answer, bad_words=words)])[0]
        return set(range(VOCAB)) - kept(target)

    assert forbidden() == {12}  # the prompt (3, 4) begins no bad word
    assert forbidden(10) == {11, 12}
    assert forbidden(10, 9) == {12}
    assert forbidden(3, 4) == {12, 13}


def test_allowed_tokens_become_a_tensor_once_per_request(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of(SamplingParams(temperature=0, allowed_token_ids=(5, 9)))
    converted: list[object] = []
    convert = sampling._tensor

    def noting(token_ids: Collection[int], device: torch.device) -> torch.Tensor:
        converted.append(token_ids)
        return convert(token_ids, device)

    monkeypatch.setattr(sampling, "_tensor", noting)
    for _ in range(2):
        assert kept(target_logits(random_logits(1), [row])[0]) == {5, 9}
    assert (5, 9) not in converted


def test_an_answer_cannot_end_before_its_minimum_length() -> None:
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(30,))
    for ignore_eos in (False, True):
        seq = sequence(replace(params, ignore_eos=ignore_eos), (9,))
        rows = [SampleRow(seq), SampleRow(seq, (9,))]
        target = target_logits(torch.zeros(2, VOCAB), rows)
        assert set(range(VOCAB)) - kept(target[0]) == {EOS, 30}
        assert kept(target[1]) == set(range(VOCAB))


def test_what_would_leave_nothing_to_choose_gives_way() -> None:
    params = SamplingParams(temperature=0, allowed_token_ids=(EOS,), min_tokens=5)
    assert kept(target_logits(random_logits(1), [row_of(params)])[0]) == {EOS}


def test_a_mask_forbids_tokens_to_greedy_and_sampled_rows() -> None:
    logits = random_logits(2)
    allowed = torch.zeros(2, VOCAB, dtype=torch.bool)
    allowed[0, 40:43] = True
    allowed[1, 50] = True
    rows = [row_of(SamplingParams(temperature=0)), row_of(SamplingParams(temperature=1, top_p=0.99))]
    target = target_logits(logits, rows, allowed)
    assert kept(target[0]) == {40, 41, 42}
    assert choose(target, rows)[1] == 50


def test_the_smallest_temperatures_are_greedy_and_the_next_do_not_overflow() -> None:
    logits = random_logits(1)
    assert target_logits(logits, [row_of(SamplingParams(temperature=1e-6))]) is logits
    cold = row_of(SamplingParams(temperature=1e-5, top_p=0.9))
    target = target_logits(logits, [cold])
    assert target.isfinite().any()
    assert choose(target, [cold]) == best_of(logits).tolist()


def test_no_rows_are_no_work() -> None:
    logits = torch.empty(0, VOCAB, dtype=torch.bfloat16)
    assert choose(target_logits(logits, []), []) == []


# ---- Log-probabilities ----


def slow_logprobs(row: np.ndarray, token: int, num_top: int) -> TokenLogprob:
    top = sorted(range(len(row)), key=lambda t: (-row[t], t))[:num_top]
    total = math.log(sum(math.exp(v) for v in row.tolist()))
    rank = sum(v >= row[token] for v in row.tolist())
    return TokenLogprob(token, row[token] - total, rank, tuple((t, row[t] - total) for t in top))


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_are_the_models_own_with_vllms_rank(num_top: int) -> None:
    logits = random_logits(30)
    logits[::2] = logits[::2].round()  # ties
    tokens = [t % VOCAB for t in range(0, 300, 10)]
    got = token_logprobs(logits, tokens, num_top)
    for row, token, result in zip(logits.float().numpy(), tokens, got, strict=True):
        want = slow_logprobs(row, token, num_top)
        assert (result.token_id, result.rank) == (token, want.rank)
        assert result.logprob == pytest.approx(want.logprob, abs=1e-5)
        assert [t for t, _ in result.top] == [t for t, _ in want.top]
        assert [p for _, p in result.top] == pytest.approx([p for _, p in want.top], abs=1e-5)


def test_the_most_probable_token_has_rank_one() -> None:
    (result,) = token_logprobs(torch.tensor([[0.0, 3.0, 1.0]]), [1], 1)
    assert result.rank == 1
    assert result.top == ((1, result.logprob),)


def test_more_top_logprobs_than_tokens_lists_them_all() -> None:
    (result,) = token_logprobs(torch.tensor([[0.0, 3.0, 1.0]]), [0], 20)
    assert [t for t, _ in result.top] == [1, 2, 0]
    assert result.rank == 3


def test_logprobs_of_a_row_are_the_same_alone() -> None:
    logits = random_logits(40, vocab=1003)
    tokens = list(range(40))
    together = token_logprobs(logits, tokens, 5)
    assert together == [token_logprobs(logits[i : i + 1], [i], 5)[0] for i in range(40)]


# ---- Parameters ----


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {5: math.nan}),
        ("seed", 2**63),
        ("stop", ("",)),
        ("bad_words", ("",)),
        ("min_tokens", -1),
        ("max_tokens", 0),
        ("allowed_token_ids", ()),
        ("logprobs", 21),
        ("n", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(param: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=param) as error:
        SamplingParams(**{param: value})  # type: ignore[arg-type]
    assert error.value.param == param


def test_a_minimum_above_the_maximum_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"min_tokens must be at most max_tokens \(3\), got 4"):
        SamplingParams(min_tokens=4, max_tokens=3)


@pytest.mark.parametrize("param", ["logit_bias", "stop_token_ids", "allowed_token_ids"])
@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_outside_the_vocabulary_is_refused_by_name(param: str, token: int) -> None:
    value = {token: 1.0} if param == "logit_bias" else (token,)
    params = SamplingParams(**{param: value})  # type: ignore[arg-type]
    with pytest.raises(
        InvalidRequestError, match=rf"{param} must be token ids in \[0, 61\), got {token}"
    ) as e:
        params.check_token_ids(VOCAB)
    assert e.value.param == param
    params.check_token_ids(VOCAB + 1) if token >= 0 else None


def test_plain_parameters_ask_for_nothing() -> None:
    plain = SamplingParams()
    assert (plain.is_greedy, plain.filters, plain.adjusts) == (False, False, False)
    assert SamplingParams(top_k=-1).filters is False
