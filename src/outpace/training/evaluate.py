"""What a trained draft gives when served: measured with the real engine, beside one without speculation.

A fine-tuned target is measured beside its baseline, too: how good the answers of both are, and how fast.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outpace.bench.report import provenance
from outpace.config import EngineConfig
from outpace.engine.engine import DEFAULT_MODEL_NAME, Engine
from outpace.errors import ConfigError
from outpace.models.loader import read_json
from outpace.models.tokenizer import encode_chat
from outpace.request import FinishReason, Output
from outpace.sampling import SamplingParams
from outpace.training.data import BadLineError, Message, Report, read_conversations
from outpace.training.quality import Metric, Question, load_metrics, read_question, score


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured.

    Attributes:
        draft: Directory of the draft.
        data: File or hub id with conversations: the prompts are theirs, up to the first answer.
        model: The target; None is what the draft was trained for.
        base: Another model that is measured along without speculation, to compare with; None is none.
        quality: Metrics of the answers, names of `quality.METRICS`; the data then has the references.
        num_prompts: How many of them.
        concurrency: Requests at a time, each a measurement of its own.
        repeat: How often each measurement is made; in each, engines work in turn, a second at a time.
        max_tokens: Tokens of an answer at most.
        temperature: Of the answers.
        spec_tokens: Most draft tokens of a sequence in a step; None is the engine's default.
        spec_policy: Who says how many.
        num_threads: Of the kernels; None is one per core.
        step_log: Where the engine with the draft writes its steps down, as `outpace serve` does.
        max_bad_share: Most lines of `data` that may be of no use, as a share.
    """

    draft: Path
    data: str
    model: str | None = None
    base: str | None = None
    quality: tuple[str, ...] = ()
    num_prompts: int = 80
    concurrency: tuple[int, ...] = (1, 8, 32)
    repeat: int = 1
    max_tokens: int = 128
    temperature: float = 0.0
    spec_tokens: int | None = None
    spec_policy: str = "goodput"
    num_threads: int | None = None
    step_log: str | None = None
    max_bad_share: float = 0.01


_TURN_S = 1.0  # after which another engine has its turn


@dataclass
class _Pass:
    """All prompts answered once by one engine.

    Attributes:
        seconds: How long that took; others' turns do not count, here and below.
        num_steps: Steps of sequences that gave a token.
        num_cut: Answers that were longer than allowed.
        first_s: When the first tokens of each answer came, and
        last_s: when its last ones did.
        answers: Tokens of each.
        texts: Text of each, in the order of the prompts.
    """

    seconds: float = 0.0
    num_steps: int = 0
    num_cut: int = 0
    answers: dict[str, list[int]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)
    last_s: dict[str, float] = field(default_factory=dict)

    def add(self, output: Output, now: float) -> None:
        """Takes in what a step gave, so many seconds after the beginning."""
        self.first_s.setdefault(output.request_id, now)
        self.last_s[output.request_id] = now
        self.num_steps += 1
        self.num_cut += output.finish_reason is FinishReason.LENGTH
        self.answers.setdefault(output.request_id, []).extend(output.token_ids)
        self.texts[output.request_id] += output.text

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.answers.values()))

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first of an answer: what is left of the prompts' time."""
        seconds = sum(self.last_s[key] - first for key, first in self.first_s.items())
        return seconds / max(1, self.num_tokens - len(self.answers))


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures a draft at each concurrency.

    Returns:
        The report: for each concurrency the speed-up over no speculation, of whole answers (`speed_up`) and
        of their tokens after the first (`tpot_speed_up`, without the prompts' time), tokens per step of a
        sequence, acceptance length and rate, in all and by depth, and how many answers are the same; with a
        base its speed, too. Then the quality of the answers.

    Raises:
        ConfigError: The draft, a model, the data or a metric cannot be had.
    """
    metrics = load_metrics(config.quality)
    configs = engine_configs(config)
    conversations, questions = read_prompts(config, metrics)
    answerers = [_Answerer(Engine.from_config(c), conversations, config) for c in configs]
    for answerer in answerers:  # what is built on first use
        _in_turn([answerer.run(1, num_prompts=2)])
    results, passes = [], []
    for concurrency in config.concurrency:
        rounds, drafts = _measure(answerers, concurrency, config.repeat)
        results.append({"concurrency": concurrency} | _compared(rounds, drafts))
        passes = rounds[-1]
    for answerer in answerers:
        answerer.engine.close()
    report = {"kind": "evaluate", **provenance(0), "settings": _shown(config), "results": results}
    if metrics:
        report["quality"] = _quality(metrics, questions, passes)
    return report


def _shown(config: EvaluateConfig) -> dict[str, Any]:
    """The settings as JSON has them."""
    return dataclasses.asdict(config) | {"draft": str(config.draft)}


def engine_configs(config: EvaluateConfig) -> list[EngineConfig]:
    """The engine without speculation, the one with the draft, and that of the base if there is one.

    Raises:
        ConfigError: The draft does not say what it drafts for, and no model is named.
    """
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
    )
    drafting = dataclasses.replace(
        plain,
        spec_method=section.get("algorithm", "draft_model"),
        spec_model=str(config.draft),
        spec_tokens=config.spec_tokens,
        spec_policy=config.spec_policy,
        step_log=config.step_log,
    )
    bases = [] if config.base is None else [dataclasses.replace(plain, model=config.base)]
    return [plain, drafting, *bases]


def read_prompts(config: EvaluateConfig, metrics: list[Metric]) -> tuple[list[list[Message]], list[Question]]:
    """The messages of each conversation up to its first answer, and where quality is measured its question.

    Raises:
        ConfigError: The data cannot be had, or too much of it is of no use.
    """
    report = Report()
    conversations: list[list[Message]] = []
    questions: list[Question] = []
    for where, messages, row in read_conversations(config.data, report):
        try:
            questions += [read_question(messages, row, metrics)] if metrics else []
        except BadLineError as error:
            report.add_bad(where, str(error))
            continue
        conversations.append(list(itertools.takewhile(lambda m: m["role"] != "assistant", messages)))
        if len(conversations) == config.num_prompts:
            break
    report.check(config.data, config.max_bad_share)
    return conversations, questions


class _Answerer:
    """An engine and the prompts, as its model reads them."""

    def __init__(self, engine: Engine, conversations: list[list[Message]], config: EvaluateConfig) -> None:
        self.engine, self._config = engine, config
        self._prompts = [encode_chat(engine.tokenizer, messages) for messages in conversations]

    def run(self, concurrency: int, num_prompts: int | None = None) -> Iterator[_Pass]:
        """Answers the prompts in a closed loop: as soon as one is answered, the next one comes.

        No prompt is known from an earlier pass; what prompts have in common is in the cache as when served.

        Yields:
            The same pass after each turn, as far as it is.
        """
        engine, config = self.engine, self._config
        engine.reset_prefix_cache()
        groups = [
            engine.admission.requests(
                str(number),
                prompt,
                SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, seed=number),
            )
            for number, prompt in enumerate(self._prompts[:num_prompts])
        ]
        result, waiting, num_running = _Pass(texts={group[0].id: "" for group in groups}), iter(groups), 0
        begin, turn = time.perf_counter(), 1
        while len(result.answers) < len(groups) or num_running:
            for group in itertools.islice(waiting, concurrency - num_running):
                engine.add(group)
                num_running += 1
            outputs = engine.step()
            result.seconds = time.perf_counter() - begin
            for output in outputs:
                result.add(output, result.seconds)
                num_running -= output.finish_reason is not None
            if result.seconds >= turn * _TURN_S:
                yield result
                begin, turn = time.perf_counter() - result.seconds, turn + 1
                engine.metrics.resume()
        yield result


def _in_turn(runs: list[Iterator[_Pass]]) -> list[_Pass]:
    """Runs engines in turn, the least far one next: the machine's speed changes within a minute."""
    passes = [next(run) for run in runs]
    unfinished = set(range(len(runs)))
    while unfinished:
        number = min(unfinished, key=lambda n: len(passes[n].answers))
        if next(runs[number], None) is None:
            unfinished.remove(number)
    return passes


def _measure(
    answerers: list[_Answerer], concurrency: int, repeat: int
) -> tuple[list[list[_Pass]], dict[str, Any]]:
    """Measures all engines side by side.

    Returns:
        For each repetition a pass of each engine; and what became of the drafts.
    """
    counts = answerers[1].engine.metrics.drafts
    before = dataclasses.replace(counts, num_accepted_per_depth=list(counts.num_accepted_per_depth))
    rounds = [_in_turn([answerer.run(concurrency) for answerer in answerers]) for _ in range(repeat)]
    num_drafts = counts.num_drafts - before.num_drafts
    accepted = counts.num_accepted_tokens - before.num_accepted_tokens
    drafted = counts.num_draft_tokens - before.num_draft_tokens
    depths = itertools.zip_longest(counts.num_accepted_per_depth, before.num_accepted_per_depth, fillvalue=0)
    return rounds, {
        "acceptance_length": 1 + accepted / max(1, num_drafts),
        "acceptance_rate": accepted / max(1, drafted),
        "acceptance_by_depth": [(now - then) / max(1, num_drafts) for now, then in depths],
        "num_drafts": num_drafts,
    }


def _compared(rounds: list[list[_Pass]], drafts: dict[str, Any]) -> dict[str, Any]:
    """The result at one concurrency."""
    plain, drafting, *base = zip(*rounds, strict=True)
    pairs = list(zip(plain, drafting, strict=True))
    last = drafting[-1]
    result = {
        "speed_up": statistics.median(p.seconds / d.seconds for p, d in pairs),
        "tpot_speed_up": statistics.median(p.tpot_s / d.tpot_s if d.tpot_s else 1.0 for p, d in pairs),
        "tpot_ms": 1e3 * statistics.median(d.tpot_s for d in drafting),
        "tpot_ms_plain": 1e3 * statistics.median(p.tpot_s for p in plain),
        "tokens_per_s": statistics.median(d.tokens_per_s for d in drafting),
        "tokens_per_s_plain": statistics.median(p.tokens_per_s for p in plain),
        "tokens_per_step": last.num_tokens / last.num_steps,
        **drafts,
        "num_same_answers": sum(p.answers[k] == d.answers[k] for p, d in pairs for k in p.answers),
        "num_answers": sum(len(p.answers) for p in plain),
    }
    for of_base in base:
        # answers differ in length: not of seconds
        ratios = [d.tokens_per_s / b.tokens_per_s for d, b in zip(drafting, of_base, strict=True)]
        result |= {
            "tokens_per_s_base": statistics.median(b.tokens_per_s for b in of_base),
            "speed_up_over_base": statistics.median(ratios),
        }
    return result


def _quality(metrics: list[Metric], questions: list[Question], passes: list[_Pass]) -> dict[str, Any]:
    """How good the answers with drafts are, and the base's."""
    _, *measured = passes
    texts = [list(p.texts.values()) for p in measured]
    return {
        "num_answers": len(questions),
        "num_cut": [p.num_cut for p in measured],
        "metrics": {metric.name: score(metric, questions, *texts) for metric in metrics},
    }
