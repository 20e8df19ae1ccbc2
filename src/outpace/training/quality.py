"""How good answers are against references, in percent, with the interval that chance leaves.

    exact_match        SQL, equal as text (`outpace.training.sql.normalise`)
    execution_match    SQL, equal in what SQLite finds (`outpace.training.sql.execution_match`)
    rouge1, rouge2     F1 of words and of pairs of words, stemmed (Lin, 2004; package rouge-score)
    rougeL, rougeLsum  F1 of the longest common subsequence, of the whole text and sentence by sentence
    bleu               BLEU of the whole corpus (package sacrebleu: 13a tokens, case counts)

Of several references the best counts, for BLEU the n-grams of all. Intervals are 95 % percentile intervals
of the bootstrap over answers; of two models' difference over pairs of answers to the same prompt, so that
what is hard for both does not blur it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from outpace.errors import ConfigError
from outpace.training import sql
from outpace.training.data import BadLineError, Message

_NUM_RESAMPLES = 1000
_BOUNDS = (2.5, 97.5)  # percent
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Question:
    """What was asked, and what would have been right.

    Attributes:
        prompt: The text that the model answers.
        references: Right answers, at least one.
    """

    prompt: str
    references: tuple[str, ...]


class Metric(ABC):
    """A number for a set of answers: a function of what is counted in each, summed up."""

    name: ClassVar[str]

    def check(self, question: Question) -> None:
        """Whether an answer to it can be measured.

        Raises:
            BadLineError: It cannot.
        """

    @abstractmethod
    def counts(self, question: Question, answer: str) -> Sequence[float]:
        """What counts of one answer; always as many numbers."""

    def value(self, sums: NDArray[np.float64], num_answers: int) -> float:
        """The metric in percent, from sums over the counts; here the mean of the only one."""
        return float(100 * sums[0] / num_answers)


class ExactMatch(Metric):
    """Share of queries that are a reference."""

    name = "exact_match"

    def counts(self, question: Question, answer: str) -> Sequence[float]:
        """Whether it is one."""
        return [any(sql.exact_match(answer, reference) for reference in question.references)]


class ExecutionMatch(Metric):
    """Share of queries that find what a reference finds."""

    name = "execution_match"

    def check(self, question: Question) -> None:
        """There must be tables to query."""
        if not sql.create_statements(question.prompt):
            raise BadLineError(f"its prompt has no CREATE TABLE statement, which {self.name} needs")

    def counts(self, question: Question, answer: str) -> Sequence[float]:
        """Whether it does."""
        return [any(sql.execution_match(question.prompt, answer, r) for r in question.references)]


class Rouge(Metric):
    """Mean F1 of one kind of overlap."""

    def __init__(self) -> None:
        """Loads the scorer.

        Raises:
            ConfigError: It is not installed.
        """
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            raise _not_installed(self.name, "rouge-score") from None
        self._scorer = RougeScorer([self.name], use_stemmer=True)

    def counts(self, question: Question, answer: str) -> Sequence[float]:
        """F1 against the reference that fits best."""
        scores = self._scorer.score_multi(
            [_by_sentence(r) for r in question.references], _by_sentence(answer)
        )
        return [scores[self.name].fmeasure]


class Rouge1(Rouge):
    """Words."""

    name = "rouge1"


class Rouge2(Rouge):
    """Pairs of words."""

    name = "rouge2"


class RougeL(Rouge):
    """Longest common subsequence."""

    name = "rougeL"


class RougeLsum(Rouge):
    """The same, sentence by sentence."""

    name = "rougeLsum"


class Bleu(Metric):
    """BLEU of all answers together."""

    name = "bleu"

    def __init__(self) -> None:
        """Loads the scorer.

        Raises:
            ConfigError: It is not installed.
        """
        try:
            from sacrebleu.metrics.bleu import BLEU
        except ImportError:
            raise _not_installed(self.name, "sacrebleu") from None
        # of a single sentence only its counts are used: `effective_order` silences a warning about its score
        self._bleu = BLEU(effective_order=True)

    def counts(self, question: Question, answer: str) -> Sequence[float]:
        """N-grams that are right, and all, by n; words of the answer and of the reference next to it."""
        score = self._bleu.sentence_score(answer, list(question.references))
        return [*score.counts, *score.totals, score.sys_len, score.ref_len]

    def value(self, sums: NDArray[np.float64], num_answers: int) -> float:
        """From the summed n-grams."""
        *ngrams, answer_len, reference_len = (int(x) for x in sums)
        half = len(ngrams) // 2
        score = self._bleu.compute_bleu(ngrams[:half], ngrams[half:], answer_len, reference_len)
        return float(score.score)


METRICS: dict[str, Callable[[], Metric]] = {
    kind.name: kind for kind in (ExactMatch, ExecutionMatch, Rouge1, Rouge2, RougeL, RougeLsum, Bleu)
}


def load_metrics(names: Sequence[str]) -> list[Metric]:
    """The metrics of these names.

    Raises:
        ConfigError: One is unknown, or its package is not installed.
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"--quality takes {', '.join(METRICS)}; got {name!r}")
    return [METRICS[name]() for name in names]


def read_question(messages: Sequence[Message], row: dict[str, Any], metrics: Sequence[Metric]) -> Question:
    """The first question of a conversation, with its `references` or else the answer that is given.

    Args:
        messages: The conversation.
        row: The whole line of the data.
        metrics: What is to be measured.

    Raises:
        BadLineError: They are no texts, or a metric cannot work on it.
    """
    number = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    references = row.get("references", [messages[number]["content"]])
    if not (isinstance(references, list) and references and all(isinstance(r, str) for r in references)):
        raise BadLineError("its references are not a list of texts")
    question = Question("\n".join(m["content"] for m in messages[:number]), tuple(references))
    for metric in metrics:
        metric.check(question)
    return question


def score(
    metric: Metric, questions: Sequence[Question], answers: Sequence[str], base: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measures answers.

    Args:
        metric: How.
        questions: What was asked.
        answers: The answer to each.
        base: Answers of another model to compare with.

    Returns:
        `value`, `low` and `high`; with a base the same of it as `base`, and of the difference to it.
    """
    counts = _counts(metric, questions, answers)
    rng = np.random.default_rng(0)
    picks = rng.integers(len(answers), size=(_NUM_RESAMPLES, len(answers)))
    values = _values(metric, counts, picks)
    result: dict[str, Any] = _interval(values)
    if base is not None:
        of_base = _values(metric, _counts(metric, questions, base), picks)
        result |= {"base": _interval(of_base), "difference": _interval(values - of_base)}
    return result


def _counts(metric: Metric, questions: Sequence[Question], answers: Sequence[str]) -> NDArray[np.float64]:
    """[answers, counts]."""
    pairs = zip(questions, answers, strict=True)
    return np.array([metric.counts(question, answer) for question, answer in pairs], np.float64)


def _values(metric: Metric, counts: NDArray[np.float64], picks: NDArray[np.int64]) -> NDArray[np.float64]:
    """[1 + resamples]: of all answers, then of each resample of them."""
    num = len(counts)
    return np.array(
        [metric.value(counts.sum(axis=0), num), *(metric.value(counts[p].sum(axis=0), num) for p in picks)]
    )


def _interval(values: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.percentile(values[1:], _BOUNDS)
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def _by_sentence(text: str) -> str:
    """A sentence per line, as ROUGE-Lsum reads them; the other kinds pass over line ends."""
    return "\n".join(_SENTENCE_END.split(text.strip()))


def _not_installed(metric: str, package: str) -> ConfigError:
    return ConfigError(f"--quality {metric} needs {package}: pip install 'outpace[eval]'")
