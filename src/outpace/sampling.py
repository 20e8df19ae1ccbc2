"""What a request asks of sampling, and the one function from logits to the target distribution."""

from __future__ import annotations

import enum
import functools
import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from outpace.device import Download, indices, tensor_of, upload
from outpace.errors import InvalidRequestError
from outpace.kernels import Kernels
from outpace.kernels.reference_sampling import best_tokens, hash_tokens

if TYPE_CHECKING:
    from outpace import request

MAX_LOGPROBS = 20
MIN_TEMPERATURE = 1e-5  # anything below is greedy: dividing by it would overflow


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """What every answer must look like: exactly one of these, with vLLM's names.

    Attributes:
        json: A JSON schema, as an object or as its text. An object has no properties but those that are
            named, unless `additionalProperties` says so or none is named.
        regex: A regular expression for the whole answer.
        choice: The texts to choose from.
        grammar: A grammar in GBNF, llama.cpp's notation, whose first rule is called `root`.
        json_object: Any JSON object.
        structural_tag: Text with constrained parts, in the JSON that xgrammar calls a structural tag.
        disable_any_whitespace: For `json`: only `", "` and `": "`, no other space between tokens. Less is
            left to choose then, and what is not left to choose is drafted for free.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        """Checks that exactly one is given.

        Raises:
            InvalidRequestError: None or several are.
        """
        given = self.given
        if len(given) != 1:
            names = ", ".join(_STRUCTURES)
            reason = f"got {' and '.join(given)}" if given else "got none"
            raise InvalidRequestError(
                f"structured_outputs needs exactly one of {names}: {reason}", "structured_outputs"
            )
        if self.disable_any_whitespace and self.json is None:
            raise InvalidRequestError(
                f"disable_any_whitespace goes with json, not with {given[0]}", "structured_outputs"
            )
        if self.choice is not None:
            _require(len(self.choice) > 0, "structured_outputs.choice", [], "a non-empty list")

    @property
    def given(self) -> list[str]:
        """The names of the constraints that are given."""
        return [name for name in _STRUCTURES if getattr(self, name) not in (None, False)]


_STRUCTURES = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose and when to stop, with the field names of vLLM and the OpenAI API.

    Attributes:
        n: Number of answers for the prompt.
        temperature: Logits are divided by it; 0 (or below 1e-5) is greedy.
        top_p: Keep the smallest set of most probable tokens whose mass reaches this, in (0, 1].
        top_k: Keep the k most probable tokens; 0 or -1 keeps all.
        min_p: Drop tokens less probable than this times the most probable one, in [0, 1].
        presence_penalty: Subtracted once from every token already in the answer, in [-2, 2].
        frequency_penalty: Subtracted per occurrence in the answer, in [-2, 2].
        repetition_penalty: Divides (positive) or multiplies (negative) the logits of tokens already in
            the prompt or answer, in [0.01, 100]; 1 is off.
        logit_bias: Added to the logits of the given token ids, each in [-100, 100].
        seed: Makes the answer reproducible; None draws one at admission.
        stop: Strings that end the answer.
        stop_token_ids: Tokens that end the answer.
        include_stop_str_in_output: Whether a matched stop string stays in the text.
        min_tokens: No end-of-sequence token and no stop token before this many tokens.
        max_tokens: Length limit of the answer, at most what the prompt leaves of the context; None is all
            of that.
        ignore_eos: Go on after the end-of-sequence token.
        bad_words: Strings never to be completed.
        allowed_token_ids: If given, only these tokens are ever chosen.
        logprobs: If given, return the chosen token's log-probability and this many most probable ones.
        skip_special_tokens: Whether special tokens are left out of the text.
        structured_outputs: What the answer must look like. It ends with an end-of-sequence token where it is
            complete; bad words, allowed tokens and minimum length give way where they would leave nothing.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    ignore_eos: bool = False
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            InvalidRequestError: A value is out of range; `param` names the field.
        """
        _require(self.n >= 1, "n", self.n, "at least 1")
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "finite and at least 0")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= -1, "top_k", self.top_k, "at least 1, or 0 or -1 for all tokens")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "in [-2, 2]")
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "in [-2, 2]")
        repetition = self.repetition_penalty
        _require(0.01 <= repetition <= 100, "repetition_penalty", repetition, "in [0.01, 100]")
        for bias in self.logit_bias.values():
            _require(-100 <= bias <= 100, "logit_bias", bias, "in [-100, 100]")
        if self.seed is not None:
            _require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer")
        _require(all(self.stop), "stop", "''", "a non-empty string")
        _require(all(self.bad_words), "bad_words", "''", "a non-empty string")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "at least 0")
        if self.max_tokens is not None:
            _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
            limit = f"at most max_tokens ({self.max_tokens})"
            _require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, limit)
        if self.allowed_token_ids is not None:
            _require(len(self.allowed_token_ids) > 0, "allowed_token_ids", [], "a non-empty list")
        if self.logprobs is not None:
            _require(0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", self.logprobs, f"in [0, {MAX_LOGPROBS}]")
        if self.structured_outputs is not None:
            limit = "false with structured outputs: the answer ends where it is complete"
            _require(not self.ignore_eos, "ignore_eos", self.ignore_eos, limit)

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken, without noise or filters."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def filters(self) -> bool:
        """Whether only some of the most probable tokens are kept."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def adjusts(self) -> bool:
        """Whether logits change before temperature: penalties, bias and forbidden tokens."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
            or self.bad_words
            or self.allowed_token_ids is not None
        )

    def check_token_ids(self, vocab_size: int) -> None:
        """Checks that the tokens named exist.

        Raises:
            InvalidRequestError: One is not in [0, vocab_size); `param` names the field.
        """
        named: dict[str, Collection[int]] = {
            "logit_bias": self.logit_bias,
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
        }
        for param, token_ids in named.items():
            for token_id in token_ids:
                limit = f"token ids in [0, {vocab_size})"
                _require(0 <= token_id < vocab_size, param, token_id, limit)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities at one answered position, from the model's own logits (before any parameter).

    Attributes:
        token_id: The token that was chosen.
        logprob: Its natural log-probability.
        rank: Its place among all tokens, 1 being the most probable.
        top: The most probable tokens as (token id, log-probability), best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class SampleRow(NamedTuple):
    """One row of logits to choose a token from.

    Attributes:
        sequence: Whose token it is; its known tokens come before the drafted ones.
        drafted: Drafted tokens between the last known one and the one to choose, in order. Empty but at
            the nodes of a tree.
    """

    sequence: request.Sequence
    drafted: tuple[int, ...] = ()

    @property
    def params(self) -> SamplingParams:
        """What the request asks."""
        return self.sequence.request.sampling

    @property
    def position(self) -> int:
        """Index in the sequence of the token to choose."""
        return len(self.sequence.token_ids) + len(self.drafted)

    @property
    def num_output(self) -> int:
        """Tokens of the answer before the one to choose."""
        return self.sequence.num_output + len(self.drafted)


def target_logits(
    logits: torch.Tensor, rows: Sequence[SampleRow], allowed: torch.Tensor | None = None, *, kernels: Kernels
) -> torch.Tensor:
    """The one function from the model's logits to those of the target distribution, for every path.

    In this order: grammar, repetition penalty (prompt and answer), frequency and presence penalty
    (answer), bias, allowed tokens, bad words, minimum length; then for rows that are not greedy
    temperature, top-k, top-p and min-p. Drafted ancestors count as part of the answer. Allowed tokens, bad
    words and minimum length give way where they would leave nothing to choose; a grammar leaves something.
    A row's result has the same bits whatever rows are beside it.

    Args:
        logits: [rows, vocab] float32 or bfloat16; not modified.
        rows: What each row is for.
        allowed: [rows, vocab] bool, False where a grammar forbids a token; None allows all.
        kernels: Who filters.

    Returns:
        [rows, vocab]: `logits` itself if there is nothing to do to it, else float32. Softmax over it is
        the distribution to draw from; where the row is greedy, its best token is meant.
    """
    params = [row.params for row in rows]
    if allowed is None and all(p.is_greedy and not p.adjusts for p in params):
        return logits
    target = logits.to(torch.float32, copy=True)
    if allowed is not None:
        target.masked_fill_(upload([~allowed], target.device)[0], -math.inf)
    _adjust_(target, rows)
    if not all(p.is_greedy for p in params):
        drawn = [_NO_CHANGE if p.is_greedy else p for p in params]
        limits = [tensor_of([[p.temperature] for p in drawn], np.float32)]
        if any(p.filters for p in drawn):
            limits.append(tensor_of([max(p.top_k, 0) for p in drawn]))
            limits.append(tensor_of([p.top_p for p in drawn], np.float32))
            limits.append(tensor_of([p.min_p for p in drawn], np.float32))
        temperature, *filters = upload(limits, target.device)
        target.div_(temperature)
        if filters:
            kernels.filter_logits_(target, *filters)
    return target


class Noise(enum.StrEnum):
    """What noise is for. Noises for different purposes are independent of each other.

    Attributes:
        CHOICE: Choosing tokens from the target, and for drafters that choose theirs alike.
        ACCEPTANCE: Accepting drafts by the ratio rule.
        RECOVERY: Choosing the token behind the accepted ones by the ratio rule.
        SYNTHETIC: Accepting drafts at synthetic rates.
    """

    CHOICE = "choice"
    ACCEPTANCE = "acceptance"
    RECOVERY = "recovery"
    SYNTHETIC = "synthetic"


class Chooser:
    """Chooses each row's token: a function of target logits, seed and position only."""

    def __init__(
        self,
        rows: Sequence[SampleRow],
        device: torch.device,
        *,
        kernels: Kernels,
        noise: Noise = Noise.CHOICE,
    ) -> None:
        """Takes the rows.

        Args:
            rows: What each row is for.
            device: Where logits will be.
            kernels: Who adds the noise and looks for the best.
            noise: Which noise that is.
        """
        self._kernels = kernels
        noisy = [not row.params.is_greedy for row in rows]
        if any(noisy):
            self._keys = (*upload([*_noise_keys(rows, noise), tensor_of(noisy, np.bool_)], device),)
        else:
            self._keys = _no_noise(len(rows), device)

    def __call__(self, target: torch.Tensor) -> torch.Tensor:
        """[rows, vocab] from `target_logits` -> [rows] int64, on the device: the host does not wait."""
        return self._kernels.noisy_argmax(target, *self._keys)

    def best(self, target: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What it would choose first, second and so on, and the probabilities: see `Kernels.noisy_topk`."""
        return self._kernels.noisy_topk(target, number, *self._keys)


def choose(
    target: torch.Tensor, rows: Sequence[SampleRow], *, kernels: Kernels, noise: Noise = Noise.CHOICE
) -> list[int]:
    """Chooses as `Chooser` does, and waits for the tokens.

    Args:
        target: [rows, vocab] from `target_logits`.
        rows: What each row is for.
        kernels: Who adds the noise and looks for the best.
        noise: Which noise that is.
    """
    return Download(Chooser(rows, target.device, kernels=kernels, noise=noise)(target)).tolist()


def uniforms(rows: Sequence[SampleRow], num: int, noise: Noise) -> torch.Tensor:
    """Independent uniform numbers, a function of each row's seed and position only.

    Args:
        rows: Whose seeds and positions.
        num: How many for each.
        noise: What they are for.

    Returns:
        [rows, num] float64 in (0, 1).
    """
    return hash_tokens(*_noise_keys(rows, noise), num).double().add_(0.5).mul_(2.0**-32)


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of chosen tokens under the model itself.

    As in vLLM, the rank is the number of tokens at least as probable as the chosen one. Equally probable
    tokens are listed by id, lowest first.

    Args:
        logits: [rows, vocab], the model's own.
        token_ids: The token chosen in each row.
        num_top: How many of the most probable tokens to list.
    """
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    chosen = logprobs.gather(1, indices(token_ids, logits.device).unsqueeze(1))
    found = Download(chosen.squeeze(1)), Download((logprobs >= chosen).sum(dim=-1))
    num_top = min(num_top, logits.shape[1])
    best = best_of_rows if logits.device.type == "cuda" else _best_of_each
    parts = (token_ids, *(part.tolist() for part in found), best(logprobs, num_top))
    return [TokenLogprob(*of_token) for of_token in zip(*parts, strict=True)]


def _best_of_each(logprobs: torch.Tensor, num: int) -> list[tuple[tuple[int, float], ...]]:
    """For each row of [rows, vocab] its best tokens and their values, in rank order."""
    ids = [best_tokens(row, num) for row in logprobs]
    return [
        tuple(zip(best.tolist(), row[best].tolist(), strict=True))
        for row, best in zip(logprobs, ids, strict=True)
    ]


def best_of_rows(logprobs: torch.Tensor, num: int) -> list[tuple[tuple[int, float], ...]]:
    """The same for all rows at once, and the host waits once: the shapes of what comes back are known.

    Of equal values topk gives any. So those equal to the last are looked for by id, lowest first.
    """
    if num == 0:
        return [()] * len(logprobs)
    values, ids = logprobs.topk(num)
    vocab_size = logprobs.shape[1]
    falling = torch.arange(vocab_size, 0, -1, dtype=torch.int32, device=logprobs.device)
    equal = torch.where(logprobs == values[:, -1:], falling, 0).topk(num).values
    found = Download(values), Download(ids), Download(vocab_size - equal)
    rows = []
    for row_values, row_ids, row_equal in zip(*(part.tolist() for part in found), strict=True):
        last = row_values[-1]
        above = [(i, v) for i, v in zip(row_ids, row_values, strict=True) if v > last]
        above.sort(key=lambda pair: (-pair[1], pair[0]))
        rows.append((*above, *((i, last) for i in row_equal[: num - len(above)])))
    return rows


def _adjust_(target: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Applies, in place, what comes before temperature to the rows that ask for it.

    Args:
        target: [rows, vocab] float32.
        rows: What each row is for.
    """
    sequence, known = None, torch.empty(0, dtype=torch.int64)
    device = target.device
    for row, logits in zip(rows, target, strict=True):
        params = row.params
        if not params.adjusts:
            continue
        if row.sequence is not sequence:  # the rows of a tree share the known tokens
            sequence = row.sequence
            known = _tensor(sequence.token_ids, device)
        _penalise_(logits, row, known)
        if params.logit_bias:
            bias = torch.tensor(list(params.logit_bias.values()))
            logits[_tensor(params.logit_bias, device)] += upload([bias], device)[0]
        if (kept := row.sequence.request.allowed_ids) is not None:
            _keep_only_(logits, upload([kept], device)[0])
        if forbidden := _forbidden(row):
            _forbid_(logits, _tensor(forbidden, device))


def _penalise_(logits: torch.Tensor, row: SampleRow, known: torch.Tensor) -> None:
    """Applies repetition, frequency and presence penalties to one row in place.

    Args:
        logits: [vocab] float32.
        row: What the row is for.
        known: [known tokens] int64, the sequence's.
    """
    params = row.params
    if params.repetition_penalty == 1 and not params.frequency_penalty and not params.presence_penalty:
        return
    tokens = torch.cat((known, _tensor(row.drafted, logits.device))) if row.drafted else known
    if params.repetition_penalty != 1:
        values = logits[tokens]
        penalty = params.repetition_penalty
        logits[tokens] = torch.where(values > 0, values / penalty, values * penalty)
    if params.frequency_penalty or params.presence_penalty:
        answer = tokens[row.sequence.num_prompt :]
        # not bincount, whose result has a size that the host must know
        counts = answer.new_zeros(len(logits)).scatter_add_(0, answer, torch.ones_like(answer))[answer]
        logits[answer] -= params.frequency_penalty * counts + params.presence_penalty


def _forbidden(row: SampleRow) -> list[int]:
    """Tokens that would complete a bad word, or end the answer before its minimum length."""
    request = row.sequence.request
    tokens: list[int] = []
    for word in request.bad_words_ids:
        *start, last = word
        if len(start) <= row.num_output and start == _latest(row, len(start)):
            tokens.append(last)
    if row.num_output < row.params.min_tokens:
        tokens += [*request.eos_token_ids, *row.params.stop_token_ids]
    return tokens


def _latest(row: SampleRow, num: int) -> list[int]:
    """The `num` tokens before the one to choose."""
    known = row.sequence.token_ids
    latest = [*known[max(len(known) - num, 0) :], *row.drafted]
    return latest[len(latest) - num :]


def _keep_only_(logits: torch.Tensor, tokens: torch.Tensor) -> None:
    """Sets all but the given tokens of a row to -inf, unless nothing would be left to choose."""
    values = logits[tokens]
    logits.masked_fill_(values.max() > -math.inf, -math.inf)  # no `if`, for which the host would wait
    logits[tokens] = values


def _forbid_(logits: torch.Tensor, tokens: torch.Tensor) -> None:
    """Sets tokens of a row to -inf, unless nothing else would be left to choose."""
    values = logits[tokens]
    logits[tokens] = -math.inf
    logits[tokens] = values.masked_fill_(logits.max() > -math.inf, -math.inf)


def _tensor(token_ids: Collection[int], device: torch.device) -> torch.Tensor:
    """[tokens] int64; several times faster than torch.tensor."""
    (tensor,) = upload([torch.from_numpy(np.fromiter(token_ids, np.int64, len(token_ids)))], device)
    return tensor


def _noise_keys(rows: Sequence[SampleRow], noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds and positions of a noise, [rows] int64 each.

    The seed is the request's own for choices, and one derived from it for every other purpose.
    """
    seeds = [row.sequence.request.seed for row in rows]
    if noise is not Noise.CHOICE:
        digests = (hashlib.blake2b(f"{seed}:{noise}".encode(), digest_size=8).digest() for seed in seeds)
        seeds = [int.from_bytes(digest, signed=True) for digest in digests]
    return tensor_of(seeds), tensor_of([row.position for row in rows])


@functools.cache
def _no_noise(num_rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeds and positions that nobody looks at, and that no row is noisy."""
    with torch.inference_mode(False):
        unused = torch.zeros(num_rows, dtype=torch.int64, device=device)
        return unused, unused, unused.bool()


def _require(holds: bool, param: str, value: object, limit: str) -> None:
    if not holds:
        raise InvalidRequestError(f"{param} must be {limit}, got {value}", param)


_NO_CHANGE = SamplingParams()
