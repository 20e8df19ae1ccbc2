"""From what a client asks to requests the engine can serve, or a clear refusal."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerFast

from outpace.config import EngineConfig, flag
from outpace.errors import InvalidRequestError
from outpace.models.config import ModelConfig
from outpace.request import LatencyTargets, Request, Speculation
from outpace.sampling import SamplingParams, StructuredOutputsParams
from outpace.spec.grammar import Grammars

_SEED_BITS = 63


class Admission:
    """Checks requests against the model and completes them: seeds, length limits, tokenised words.

    Not thread-safe: one front end owns it.
    """

    def __init__(
        self, config: EngineConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast, max_model_len: int
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = model.vocab_size
        # tokens accepted by chance, and what follows them, must not end a benchmark's answers
        is_synthetic = config.speculative.is_synthetic
        self._eos_token_ids = frozenset(() if is_synthetic else model.eos_token_ids)
        self._grammars = Grammars(tokenizer, model.vocab_size, self._eos_token_ids)
        self._max_model_len = max_model_len
        self._max_n = config.max_num_seqs + config.max_num_queued_reqs
        self._has_priorities = config.scheduling_policy == "priority"
        self._speculative, self._policy = config.speculative, config.policy
        self._random = random.Random(config.seed)

    def requests(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        priority: int = 0,
        speculation: Speculation | None = None,
        client: str = "",
        slo: LatencyTargets | None = None,
    ) -> list[Request]:
        """The engine requests of one client request: one for each of its n answers.

        Args:
            request_id: Unique among unfinished ones; the children are called `{request_id}-{i}`.
            prompt_ids: The prompt.
            sampling: How to choose and when to stop.
            priority: Lower runs first; not 0 only under the `priority` scheduling policy.
            speculation: What it asks of its drafts.
            client: Who asked, if known.
            slo: How soon it wants its answer; only under the policy `slo`.

        Raises:
            InvalidRequestError: It cannot be served as asked; `param` names the field.
        """
        self._check_prompt(prompt_ids)
        sampling.check_token_ids(self._vocab_size)
        if sampling.n > self._max_n:
            raise InvalidRequestError(f"n must be at most {self._max_n}, got {sampling.n}", "n")
        if priority and not self._has_priorities:
            raise InvalidRequestError(
                f"priority must be 0 under {flag('scheduling_policy')} fcfs, got {priority}: leave it out or "
                f"start with {flag('scheduling_policy')} priority",
                "priority",
            )
        speculation = speculation or Speculation()
        self._check_speculation(speculation)
        slo = slo or LatencyTargets()
        self._check_slo(slo)
        max_tokens = self._max_tokens(len(prompt_ids), sampling)
        bad_words_ids = tuple(self._bad_words_ids(sampling.bad_words))
        asked = sampling.structured_outputs
        grammar = None if asked is None else self._grammars.compile(asked)
        seed = self._random.getrandbits(_SEED_BITS) if sampling.seed is None else sampling.seed
        arrival = time.monotonic()
        return [
            Request(
                id=f"{request_id}-{index}",
                prompt_ids=tuple(prompt_ids),
                sampling=sampling,
                seed=child_seed(seed, index),
                max_tokens=max_tokens,
                eos_token_ids=self._eos_token_ids,
                bad_words_ids=bad_words_ids,
                grammar=grammar,
                index=index,
                priority=priority,
                arrival=arrival,
                speculation=speculation,
                client=client,
                slo=slo,
            )
            for index in range(sampling.n)
        ]

    def prepare(self, asked: StructuredOutputsParams) -> None:
        """Compiles what `requests` will need: the one slow part of it, and safe in any thread.

        Raises:
            InvalidRequestError: It is malformed, or asks for what cannot be enforced.
        """
        self._grammars.compile(asked)

    def _check_prompt(self, prompt_ids: Sequence[int]) -> None:
        if not prompt_ids:
            raise InvalidRequestError("the prompt is empty: give at least one token", "prompt")
        for token_id in (min(prompt_ids), max(prompt_ids)):
            if not 0 <= token_id < self._vocab_size:
                limit = f"token ids in [0, {self._vocab_size})"
                raise InvalidRequestError(f"prompt must be {limit}, got {token_id}", "prompt")

    def _check_speculation(self, asked: Speculation) -> None:
        limit = self._speculative.num_speculative_tokens
        if asked.max_draft_tokens is not None and asked.max_draft_tokens > limit:
            raise InvalidRequestError(
                f"speculation.max_draft_tokens must be at most {limit} ({flag('spec_tokens')}), "
                f"got {asked.max_draft_tokens}: ask for fewer or leave it out",
                "speculation.max_draft_tokens",
            )
        methods = (*self._speculative.methods, "none")
        if asked.method is not None and asked.method not in methods:
            raise InvalidRequestError(
                f"speculation.method must be {' or '.join(methods)} ({flag('spec_method')}), "
                f"got {asked.method!r}: leave it out for what the server chooses",
                "speculation.method",
            )

    def _check_slo(self, asked: LatencyTargets) -> None:
        is_heeded = self._policy == "slo" or "." in self._policy  # one from outside may do as it likes
        for name, value in (("ttft_ms", asked.ttft_ms), ("tpot_ms", asked.tpot_ms)):
            if value is not None and not is_heeded:
                raise InvalidRequestError(
                    f"slo.{name} is only for the policy slo, this server runs {self._policy}: leave it out "
                    f"or start with {flag('spec_policy')} slo",
                    f"slo.{name}",
                )

    def _max_tokens(self, num_prompt: int, sampling: SamplingParams) -> int:
        """What the request asks, or without a limit all that the context leaves."""
        limit = self._max_model_len - num_prompt
        if limit < 1:
            raise InvalidRequestError(
                f"the prompt has {num_prompt} tokens, the limit is {self._max_model_len - 1}: the context of "
                f"{self._max_model_len} ({flag('max_model_len')}) also holds the answer",
                "prompt",
            )
        for name, value in (("max_tokens", sampling.max_tokens), ("min_tokens", sampling.min_tokens)):
            if value is not None and value > limit:
                raise InvalidRequestError(
                    f"{name} must be at most {limit}, got {value}: the prompt takes {num_prompt} of the "
                    f"context's {self._max_model_len} tokens ({flag('max_model_len')}); ask for fewer or "
                    "leave it out",
                    name,
                )
        return limit if sampling.max_tokens is None else sampling.max_tokens

    def _bad_words_ids(self, words: tuple[str, ...]) -> Iterable[tuple[int, ...]]:
        """Each word as tokens, at the beginning of a text and, if that differs, after a space."""
        for word in words:
            bare = word.lstrip()
            if not bare:
                raise InvalidRequestError(f"bad_words must hold more than spaces, got {word!r}", "bad_words")
            encodings = (
                self._tokenizer.encode(text, add_special_tokens=False) for text in (bare, f" {bare}")
            )
            yield from dict.fromkeys(map(tuple, encodings))


def child_seed(seed: int, index: int) -> int:
    """The seed of answer `index`: the given one for the first, else a 63-bit number of its own."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> (64 - _SEED_BITS)
