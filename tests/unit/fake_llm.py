"""A stand-in for AsyncLLM with a real tokenizer and scripted answers, and a server around it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, Counter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from outpace.config import ServerConfig, SpeculativeConfig
from outpace.errors import InvalidRequestError
from outpace.request import FinishReason, LatencyTargets, Output, Speculation, TokenLogprob
from outpace.sampling import SamplingParams
from outpace.server.app import create_app
from outpace.server.run import bind

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.content == 'forbidden' %}{{ raise_exception('not this word') }}{% endif %}"
    "<|im_start|>{{ m.role + (' ' + m.name if m.name else '') }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if mood %}({{ mood }}){% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens that encodes any text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world, the quick brown fox says hello to the lazy dog"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


@dataclass
class FakeLLM:
    """Answers every prompt with `answer`, one token per output."""

    answer: str = "hello wörld"
    pause: float = 0.0  # seconds before each token
    error: Exception | None = None  # raised before the first output
    late_error: Exception | None = None  # raised after the second output
    give_up: bool = False  # end with FinishReason.ABORT
    end: tuple[FinishReason, str] | None = None  # end with this and its stop_reason
    max_model_len: int = 2048
    model_name: str = "fake"
    is_running: bool = True
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    tokenizer: Any = field(default_factory=make_tokenizer)
    calls: list[SimpleNamespace] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    shutdown_timeouts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.metrics = SimpleNamespace(registry=CollectorRegistry())
        Counter("fake_things", "Things", registry=self.metrics.registry)

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        speculation: Speculation | None = None,
        client: str = "",
        slo: LatencyTargets | None = None,
    ) -> AsyncGenerator[Output]:
        self.calls.append(
            SimpleNamespace(
                prompt_ids=prompt_ids,
                sampling=sampling,
                priority=priority,
                speculation=speculation,
                client=client,
                slo=slo,
            )
        )
        if self.error is not None:
            raise self.error
        if not prompt_ids:
            raise InvalidRequestError("the prompt is empty", "prompt")
        if max(prompt_ids) >= len(self.tokenizer):
            raise InvalidRequestError(f"token id {max(prompt_ids)} is not in the vocabulary", "prompt")
        self.running.add(request_id)
        try:
            ids = self.tokenizer.encode(self.answer)[: sampling.max_tokens]
            for position, _ in enumerate(ids):
                for index in range(sampling.n):
                    await asyncio.sleep(self.pause)
                    yield self._output(request_id, index, ids, position, sampling, len(prompt_ids))
                if position == 1 and self.late_error is not None:
                    raise self.late_error
        finally:
            self.running.discard(request_id)

    def _output(
        self,
        request_id: str,
        index: int,
        ids: list[int],
        position: int,
        sampling: SamplingParams,
        prompt: int,
    ) -> Output:
        before = self.tokenizer.decode(ids[:position]).rstrip("�")
        after = self.tokenizer.decode(ids[: position + 1]).rstrip("�")
        logprobs = None
        if sampling.logprobs is not None:
            top = tuple((ids[position] if i == 0 else i + 5, -0.5 - i) for i in range(sampling.logprobs))
            logprobs = (TokenLogprob(ids[position], -0.5, 1, top),)
        reason = None
        if position == len(ids) - 1:
            is_cut = len(ids) == sampling.max_tokens
            reason = (
                FinishReason.ABORT if self.give_up else FinishReason.LENGTH if is_cut else FinishReason.STOP
            )
        stop_reason = None
        if reason is not None and self.end is not None:
            reason, stop_reason = self.end
        return Output(
            request_id=request_id,
            index=index,
            text=after[len(before) :],
            token_ids=(ids[position],),
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_prompt_tokens=prompt,
            num_cached_tokens=prompt // 16 * 16,
        )

    async def shutdown(self, timeout: float) -> None:
        self.shutdown_timeouts.append(timeout)
        self.is_running = False


@contextlib.contextmanager
def running_server(llm: FakeLLM, config: ServerConfig | None = None) -> Iterator[str]:
    """Serves the fake over a real socket in a thread, and gives its URL."""
    app = create_app(llm, config or ServerConfig())  # type: ignore[arg-type]
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
