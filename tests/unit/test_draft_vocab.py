"""Drafts of some tokens only: which those are, on disk and in training; guesses go by the target's ids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from outpace.errors import ConfigError
from outpace.kernels import load_kernels
from outpace.models.draft_vocab import DraftVocab
from outpace.request import Sequence
from outpace.sampling import SampleRow, SamplingParams
from outpace.spec.drafter import likely_tokens
from outpace.training.losses import draft_loss
from outpace.training.method import make_settings
from outpace.training.trainer import train
from outpace.tree import DraftTree
from tiny import EOS, GREEDY, MODEL, SAMPLED, VOCAB_SIZE, answers, tiny_engine, write_model
from training_runs import row, tiny_run, write_rows

KERNELS = load_kernels("reference", torch.float32, head_dim=16, widths=(64,), num_threads=1)
SOME = DraftVocab(10, torch.tensor([1, 2, 5, 9]))


# --- Which tokens ---------------------------------------------------------------------------------------


def test_the_most_frequent_tokens_are_taken_and_those_that_are_kept_anyway() -> None:
    counts = torch.tensor([0, 5, 0, 9, 5, 7, 0])
    assert DraftVocab.most_frequent(counts, 3, kept=[6]).ids(torch.arange(3)).tolist() == [3, 5, 6]
    assert DraftVocab.most_frequent(counts, 4, kept=[99]).ids(torch.arange(4)).tolist() == [1, 3, 4, 5]
    # of tokens that are as frequent, the first
    assert DraftVocab.most_frequent(counts, 3, kept=[]).ids(torch.arange(3)).tolist() == [1, 3, 5]


@pytest.mark.parametrize("size", [0, 7, 100])
def test_a_size_of_0_or_of_all_is_the_whole_vocabulary(size: int) -> None:
    vocab = DraftVocab.most_frequent(torch.arange(7), size, kept=[])
    head, logits, ids = torch.randn(7, 2), torch.randn(3, 7), torch.tensor([[6, 0]])
    assert len(vocab) == 7
    assert vocab.d2t is None
    assert vocab.rows(head) is head
    assert vocab.spread(logits) is logits
    assert vocab.places(ids) is vocab.ids(ids) is ids


def test_places_and_ids_are_each_others_inverse() -> None:
    assert SOME.places(torch.tensor([[5, 0], [9, 1]])).tolist() == [[2, -1], [3, 0]]
    assert SOME.ids(torch.tensor([2, 3, 0])).tolist() == [5, 9, 1]
    assert SOME.d2t is not None
    assert SOME.d2t.tolist() == [1, 1, 3, 6]  # what speculators adds to a place
    assert DraftVocab.from_d2t(SOME.d2t, 10).ids(torch.arange(4)).tolist() == [1, 2, 5, 9]
    inf = torch.inf
    spread = SOME.spread(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist()
    assert spread == [[-inf, 1.0, 2.0, -inf, -inf, 3.0, -inf, -inf, -inf, 4.0]]


def test_coverage_is_the_share_of_occurrences() -> None:
    assert SOME.coverage(torch.tensor([4, 1, 1, 0, 0, 3, 0, 0, 1, 0])) == 0.5
    assert DraftVocab(3).coverage(torch.tensor([1, 2, 3])) == 1.0


# --- Guesses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SAMPLED,
        replace(SAMPLED, top_k=3),
        replace(GREEDY, logit_bias={5: 100.0, 3: 100.0}),
        replace(GREEDY, repetition_penalty=1.9, presence_penalty=2.0),
        replace(SAMPLED, allowed_token_ids=(2, 9, 70)),
    ],
    ids=["greedy", "sampled", "filtered", "biased", "penalised", "restricted"],
)
def test_guesses_are_those_of_a_whole_head_that_rules_the_other_tokens_out(sampling: SamplingParams) -> None:
    vocab = DraftVocab(VOCAB_SIZE, torch.tensor([1, 2, 5, 9, 40, 41, 70, EOS]))
    (request,) = tiny_engine().admission.requests("0", [5, 9, 40], sampling)
    rows = [SampleRow(Sequence.start(request), drafted) for drafted in ((), (2,), (2, 2))]
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    every = likely_tokens(vocab.spread(logits), rows, 3, KERNELS)
    some = likely_tokens(logits.clone(), rows, 3, KERNELS, vocab)
    assert [[token for token, _ in of] for of in some] == [[token for token, _ in of] for of in every]
    probs = [prob for of in some for _, prob in of]
    assert probs == pytest.approx([prob for of in every for _, prob in of], abs=1e-6)
    assert {token for of in some for token, _ in of} <= set(vocab.ids(torch.arange(8)).tolist())


# --- Training -------------------------------------------------------------------------------------------


def test_targets_that_cannot_be_drafted_are_no_loss_and_no_success() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    best = SOME.ids((hidden @ head.T).argmax(dim=1))
    targets = torch.tensor([int(best[0]), 0, int(best[2]), 3])
    loss, right = draft_loss(hidden, head, SOME, targets)
    known = [0, 2]
    logits = hidden[known] @ head.T
    expected = torch.nn.functional.cross_entropy(logits, SOME.places(targets[known]), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert right.tolist() == [True, False, True, False]
    halved, _ = draft_loss(hidden, head, SOME, targets, torch.full((4,), 0.5))
    assert halved.item() == pytest.approx(loss.item() / 2)


def test_settings_take_0_tokens_for_all_but_no_negative_number() -> None:
    assert make_settings("medusa", {"draft_vocab_size": 0}).draft_vocab_size == 0
    assert make_settings("medusa", {"kl_weight": 0}).kl_weight == 0.0, "JSON may write it so"
    with pytest.raises(ConfigError, match="draft_vocab_size of streaming must be at least 0, got -1"):
        make_settings("streaming", {"draft_vocab_size": -1})


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Medusa heads over the twelve most frequent tokens, each with an output head of its own."""
    out = tmp_path_factory.mktemp("draft") / "medusa"
    data = write_rows(out.with_suffix(".jsonl"), [row("x", "abracadabra")] * 6 + [row("x", "zzz")] * 6)
    settings = {"draft_vocab_size": 12, "own_heads": True, "num_heads": 2}
    train(tiny_run(target, data, out, settings=settings, epochs=20, lr=1e-2))
    return out


def test_a_run_takes_the_tokens_of_its_answers_and_reports_how_many_that_are(draft: Path) -> None:
    weights = load_file(draft / "model.safetensors")
    token_ids = weights["d2t"] + torch.arange(12)
    assert set(token_ids.tolist()) >= {*b"abrcdz", EOS}
    assert weights["heads.0.output"].shape == (12, MODEL.hidden_size)
    assert json.loads((draft / "config.json").read_text())["draft_vocab_size"] == 12
    report = json.loads((draft / "training.json").read_text())
    assert report["draft_vocab"] == {"size": 12, "coverage": 1.0}


def test_what_is_drafted_is_among_the_tokens_of_the_checkpoint(draft: Path) -> None:
    engine = tiny_engine(spec_method="medusa", spec_model=str(draft), spec_tokens=6)
    propose, drafted = engine.proposer.propose, set[int]()

    def noted(sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        trees = propose(sequences, limits)
        drafted.update(token for tree in trees for token in tree.token_ids)
        return trees

    engine.proposer.propose = noted  # type: ignore[method-assign]
    assert answers(engine, SAMPLED) == answers(tiny_engine(), SAMPLED)
    token_ids = load_file(draft / "model.safetensors")["d2t"] + torch.arange(12)
    assert len(drafted) > 2
    assert drafted <= set(token_ids.tolist())


# --- What is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d2t", "message"),
    [
        ([0] * 11 + [300], r"rising token ids in \[0, 259\), got 0 to 311, 12 different ones of 12"),
        ([-1] + [0] * 11, "got -1 to 11"),
        ([0, 0, -1] + [0] * 9, "11 different ones of 12"),
        ([0] * 11, r"wrongly shaped d2t \[11\] instead of \[12\]"),
        (None, "missing d2t"),
    ],
    ids=["too large", "negative", "twice", "short", "absent"],
)
def test_a_map_of_tokens_that_makes_no_sense_is_refused(
    d2t: list[int] | None, message: str, draft: Path, tmp_path: Path
) -> None:
    weights = load_file(draft / "model.safetensors")
    del weights["d2t"]
    if d2t is not None:
        weights["d2t"] = torch.tensor(d2t)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((draft / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        tiny_engine(spec_method="medusa", spec_model=str(tmp_path))


@pytest.mark.parametrize("size", [0, 260, "12", True])
def test_a_draft_vocabulary_larger_than_the_targets_or_of_no_size_is_refused(
    size: Any, draft: Path, tmp_path: Path
) -> None:
    save_file(load_file(draft / "model.safetensors"), tmp_path / "model.safetensors")
    config = json.loads((draft / "config.json").read_text()) | {"draft_vocab_size": size}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"draft_vocab_size in config.json must be an integer in \[1, 259\]"
    ):
        tiny_engine(spec_method="medusa", spec_model=str(tmp_path))


def test_tokens_that_are_stored_as_fractions_are_refused(draft: Path, tmp_path: Path) -> None:
    weights = load_file(draft / "model.safetensors")
    weights["d2t"] = weights["d2t"].float()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((draft / "config.json").read_text())
    with pytest.raises(ConfigError, match="d2t stored as F32"):
        tiny_engine(spec_method="medusa", spec_model=str(tmp_path))
