"""What a trained draft gives when served: measured with the real engine, beside one without speculation."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outpace.bench.report import provenance
from outpace.config import EngineConfig
from outpace.engine.engine import DEFAULT_MODEL_NAME, Engine
from outpace.errors import ConfigError
from outpace.models.loader import read_json
from outpace.models.tokenizer import encode_chat
from outpace.sampling import SamplingParams
from outpace.training.data import Report, read_conversations


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured.

    Attributes:
        draft: Directory of the draft.
        data: File or hub id with conversations: the prompts are theirs, up to the first answer.
        model: The target; None is what the draft was trained for.
        num_prompts: How many of them.
        concurrency: Requests at a time, each a measurement of its own.
        repeat: How often each measurement is made, in turn with the engine without speculation.
        max_tokens: Tokens of an answer at most.
        temperature: Of the answers.
        spec_tokens: Most draft tokens of a sequence in a step; None is the engine's default.
        spec_policy: Who says how many.
        num_threads: Of the kernels; None is one per core.
        max_bad_share: Most lines of `data` that may be of no use, as a share.
    """

    draft: Path
    data: str
    model: str | None = None
    num_prompts: int = 80
    concurrency: tuple[int, ...] = (1, 8, 32)
    repeat: int = 1
    max_tokens: int = 128
    temperature: float = 0.0
    spec_tokens: int | None = None
    spec_policy: str = "goodput"
    num_threads: int | None = None
    max_bad_share: float = 0.01


@dataclass
class _Pass:
    """All prompts answered once by one engine."""

    seconds: float = 0.0
    num_steps: int = 0
    answers: dict[str, list[int]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.answers.values()))


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures a draft at each concurrency.

    Returns:
        The report: for each concurrency the speed-up over no speculation, tokens per step of a sequence,
        acceptance length and rate, in all and by depth, and how many answers are the same.

    Raises:
        ConfigError: The draft, the model or the data cannot be had.
    """
    plain, drafting = (Engine.from_config(c) for c in engine_configs(config))
    prompts = _prompts(config, plain)
    for engine in (plain, drafting):  # what is built on first use
        _answer(engine, prompts[:2], 1, config)
    results = [_compare(plain, drafting, prompts, number, config) for number in config.concurrency]
    shown = dataclasses.asdict(config) | {"draft": str(config.draft)}
    return {"kind": "evaluate", **provenance(0), "settings": shown, "results": results}


def engine_configs(config: EvaluateConfig) -> tuple[EngineConfig, EngineConfig]:
    """The engine without speculation, and the one with the draft."""
    section = read_json(config.draft / "config.json").get("speculators_config") or {}
    model = config.model or section.get("verifier", {}).get("name_or_path")
    if model == DEFAULT_MODEL_NAME:
        model = None
    elif model is None:
        raise ConfigError(f"{config.draft} does not say which model it drafts for: name it with --model")
    plain = EngineConfig(
        model=model,
        spec_method="none",
        max_num_seqs=max(config.concurrency),
        max_num_batched_tokens=max(512, *config.concurrency),
        num_threads=config.num_threads,
        enable_prefix_caching=False,  # a prompt is answered several times, and served perhaps once
    )
    drafting = dataclasses.replace(
        plain,
        spec_method=section.get("algorithm", "draft_model"),
        spec_model=str(config.draft),
        spec_tokens=config.spec_tokens,
        spec_policy=config.spec_policy,
    )
    return plain, drafting


def _prompts(config: EvaluateConfig, engine: Engine) -> list[list[int]]:
    report = Report()
    prompts = []
    for _, messages, _ in itertools.islice(read_conversations(config.data, report), config.num_prompts):
        before = list(itertools.takewhile(lambda message: message["role"] != "assistant", messages))
        prompts.append(encode_chat(engine.tokenizer, before))
    report.check(config.data, config.max_bad_share)
    return prompts


def _compare(
    plain: Engine, drafting: Engine, prompts: list[list[int]], concurrency: int, config: EvaluateConfig
) -> dict[str, Any]:
    """Both engines in turn, since the machine's speed changes; the ratio is of neighbours."""
    counts = dataclasses.replace(drafting.metrics.drafts)
    before = list(counts.num_accepted_per_depth)
    pairs = [
        [_answer(engine, prompts, concurrency, config) for engine in (plain, drafting)]
        for _ in range(config.repeat)
    ]
    after = drafting.metrics.drafts
    num_drafts = after.num_drafts - counts.num_drafts
    accepted = after.num_accepted_tokens - counts.num_accepted_tokens
    drafted = after.num_draft_tokens - counts.num_draft_tokens
    by_depth = [b - a for a, b in itertools.zip_longest(before, after.num_accepted_per_depth, fillvalue=0)]
    _, last = pairs[-1]
    return {
        "concurrency": concurrency,
        "speed_up": statistics.median(p.seconds / d.seconds for p, d in pairs),
        "tokens_per_s": statistics.median(d.num_tokens / d.seconds for _, d in pairs),
        "tokens_per_s_plain": statistics.median(p.num_tokens / p.seconds for p, _ in pairs),
        "tokens_per_step": last.num_tokens / last.num_steps,
        "acceptance_length": 1 + accepted / max(1, num_drafts),
        "acceptance_rate": accepted / max(1, drafted),
        "acceptance_by_depth": [n / max(1, num_drafts) for n in by_depth],
        "num_drafts": num_drafts,
        "num_same_answers": sum(p.answers[k] == d.answers[k] for p, d in pairs for k in p.answers),
        "num_answers": sum(len(p.answers) for p, _ in pairs),
    }


def _answer(engine: Engine, prompts: list[list[int]], concurrency: int, config: EvaluateConfig) -> _Pass:
    """A closed loop: as soon as one is answered, the next one comes."""
    groups = [
        engine.admission.requests(
            str(number),
            prompt,
            SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, seed=number),
        )
        for number, prompt in enumerate(prompts)
    ]
    result, waiting, num_running = _Pass(), iter(groups), 0
    begin = time.perf_counter()
    while len(result.answers) < len(groups) or num_running:
        for group in itertools.islice(waiting, concurrency - num_running):
            engine.add(group)
            num_running += 1
        for output in engine.step():
            result.num_steps += 1
            result.answers.setdefault(output.request_id, []).extend(output.token_ids)
            num_running -= output.finish_reason is not None
    result.seconds = time.perf_counter() - begin
    return result
