"""Offline generation: prompts in, answers out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from outpace.config import EngineConfig
from outpace.engine.engine import Engine
from outpace.errors import InvalidRequestError
from outpace.models.tokenizer import encode, encode_chat
from outpace.request import FinishReason, LatencyTargets, Output, Request, Speculation, TokenLogprob
from outpace.sampling import SamplingParams

Prompt = str | Sequence[int]
Message = dict[str, Any]


@dataclass(slots=True)
class CompletionResult:
    """One answer.

    Attributes:
        index: Which of the n answers.
        text: Its text.
        token_ids: Its tokens, a stop or end-of-sequence token included.
        logprobs: One per token, if asked for.
        finish_reason: Why it ended.
        stop_reason: The stop string or stop token that ended it, if one did.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestResult:
    """What became of one prompt.

    Attributes:
        request_id: Its number in this LLM.
        prompt: Its text, if it was given as text.
        prompt_token_ids: Its tokens.
        outputs: Its n answers.
        num_cached_tokens: How many of its tokens came from the prefix cache, for the first answer.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionResult]
    num_cached_tokens: int = 0


class LLM:
    """A model and its engine, driven by the caller's own thread.

    ```python
    llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct")
    [result] = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=16))
    print(result.outputs[0].text)
    ```

    Attributes:
        engine: What answers.
        tokenizer: The model's.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        """Loads a model.

        Args:
            model: Directory, hub id or GGUF file; None for the default model.
            **settings: Any other field of EngineConfig.

        Raises:
            ConfigError: The model cannot be had or a setting does not fit it.
        """
        self._start(Engine.from_config(EngineConfig(model=model, **settings)))

    @classmethod
    def from_engine(cls, engine: Engine) -> LLM:
        """Drives an engine that is there already."""
        llm = cls.__new__(cls)
        llm._start(engine)
        return llm

    def _start(self, engine: Engine) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculation: Speculation | None = None,
        slo: LatencyTargets | None = None,
        progress: bool = False,
    ) -> list[RequestResult]:
        """Answers prompts, as many at a time as the engine runs.

        Args:
            prompts: One or several, each as text or as token ids.
            sampling_params: For all of them, or one per prompt; the default is `SamplingParams()`.
            speculation: What all of them ask of their drafts.
            slo: How soon each of them wants its answer; only under the policy `slo`.
            progress: Whether to show a progress bar.

        Returns:
            One result per prompt, in their order.

        Raises:
            InvalidRequestError: A prompt cannot be served as asked; none was started.
        """
        every = _as_prompts(prompts)
        params = _one_each(sampling_params, len(every))
        results: list[RequestResult] = []
        groups: list[list[Request]] = []
        for prompt, sampling in zip(every, params, strict=True):
            text = prompt if isinstance(prompt, str) else None
            ids = encode(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
            request_id = str(next(self._numbers))
            requests = self.engine.admission.requests(
                request_id, ids, sampling, speculation=speculation, slo=slo
            )
            groups.append(requests)
            answers = [
                CompletionResult(i, logprobs=None if sampling.logprobs is None else [])
                for i in range(sampling.n)
            ]
            results.append(RequestResult(request_id, text, ids, answers))
        self._run(groups, results, progress)
        return results

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculation: Speculation | None = None,
        slo: LatencyTargets | None = None,
        progress: bool = False,
    ) -> list[RequestResult]:
        """Answers conversations, laid out by the model's chat template.

        Args:
            messages: One conversation or several; each message has `role` and `content`.
            sampling_params: As for `generate`.
            speculation: As for `generate`.
            slo: As for `generate`.
            progress: Whether to show a progress bar.

        Raises:
            InvalidRequestError: The model has no chat template, or it refuses the messages.
        """
        conversations: Any = messages if messages and isinstance(messages[0], list) else [messages]
        prompts = [encode_chat(self.tokenizer, conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, speculation=speculation, slo=slo, progress=progress)

    def _run(self, groups: list[list[Request]], results: list[RequestResult], progress: bool) -> None:
        answers = {
            request.id: (result, result.outputs[request.index])
            for group, result in zip(groups, results, strict=True)
            for request in group
        }
        unfinished = set(answers)
        try:
            for output in _progress(self._outputs(groups), len(answers), progress):
                result, answer = answers[output.request_id]
                _extend(answer, output)
                if output.finish_reason is not None:
                    unfinished.remove(output.request_id)
                    if output.index == 0:
                        result.num_cached_tokens = output.num_cached_tokens
        finally:
            for request_id in unfinished:  # an error or Ctrl-C: leave the engine empty
                self.engine.abort(request_id)

    def _outputs(self, groups: list[list[Request]]) -> Iterator[Output]:
        """Feeds the engine as its queue has room, and gives all outputs."""
        waiting = iter(groups)
        group = next(waiting, None)
        while group is not None or self.engine.has_work:
            while group is not None and self.engine.scheduler.has_room(len(group)):
                self.engine.add(group)
                group = next(waiting, None)
            yield from self.engine.step()


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams]:
    if params is None:
        return [SamplingParams()] * num_prompts
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise InvalidRequestError(
            f"{len(params)} sampling_params given for {num_prompts} prompts", "sampling_params"
        )
    return params


def _extend(answer: CompletionResult, output: Output) -> None:
    answer.text += output.text
    answer.token_ids.extend(output.token_ids)
    if answer.logprobs is not None and output.logprobs is not None:
        answer.logprobs.extend(output.logprobs)
    answer.finish_reason, answer.stop_reason = output.finish_reason, output.stop_reason


def _progress(outputs: Iterator[Output], num_answers: int, shown: bool) -> Iterator[Output]:
    """Passes outputs on; counts finished answers on a bar if it is to be shown."""
    if not shown:
        yield from outputs
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("Generating", total=num_answers)
        for output in outputs:
            if output.finish_reason is not None:
                bar.advance(task)
            yield output
