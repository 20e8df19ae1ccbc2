"""What every draft method must keep. The files in spec/proposers are found by themselves.

A method that needs more than its name to be built is given it in `settings_of`.
"""

from __future__ import annotations

import gc
import importlib
import json
import random
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch

from outpace.engine.engine import Engine
from outpace.models.loader import load_config, load_weights
from outpace.policy.base import BatchView, SpeculationPolicy
from outpace.request import Sequence
from outpace.runtime.block_manager import BlockManager
from outpace.sampling import SamplingParams
from outpace.spec import proposer as proposers
from outpace.spec.proposer import Proposer
from outpace.training import method as training
from outpace.training.trainer import TrainConfig, train
from outpace.tree import DraftTree
from tiny import GREEDY, PROMPTS, SAMPLED, VOCAB_SIZE, Guesser, answers, run, submit, tiny_engine, write_model

METHODS = [*proposers.available(), "suffix,draft_model,self_draft"]


class Limits(SpeculationPolicy):
    """Any limits from 0 to the most that is allowed, and a cut after drafting now and then."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.rng = random.Random(most)

    def limits(self, view: BatchView) -> list[int]:
        return [self.rng.randint(0, min(self.most, sequence.max_draft)) for sequence in view.sequences]

    def trim(self, view: BatchView, confidences: Any) -> list[int] | None:
        return [self.rng.randint(0, self.most) for _ in confidences] if self.rng.random() < 0.2 else None


class Checked(Proposer):
    """Hands everything on to a proposer and checks what it gives back."""

    def __init__(self, proposer: Proposer, blocks: BlockManager) -> None:
        self.proposer, self.blocks = proposer, blocks
        self.observe = proposer.observe  # type: ignore[method-assign]
        self.release = proposer.release  # type: ignore[method-assign]
        self.streams = proposer.streams  # type: ignore[method-assign]

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        before = [(list(s.token_ids), s.num_computed, list(s.block_ids)) for s in sequences]
        num_free = self.blocks.num_free_blocks
        trees = self.proposer.propose(sequences, list(limits))
        assert self.blocks.num_free_blocks == num_free
        assert before == [(s.token_ids, s.num_computed, s.block_ids) for s in sequences]
        assert len(trees) == len(sequences)
        for tree, limit in zip(trees, limits, strict=True):
            assert len(tree) <= limit
            check_tree(tree)
        return trees


def check_tree(tree: DraftTree) -> None:
    """What DraftTree does not check when it is built: tokens that exist, no node twice, probabilities."""
    assert all(0 <= token_id < VOCAB_SIZE for token_id in tree.token_ids)
    nodes = list(zip(tree.parents, tree.token_ids, strict=True))
    assert len(set(nodes)) == len(tree), "siblings draft the same token"
    assert all(0 <= confidence <= 1 for confidence in tree.confidence or ())


@pytest.fixture(scope="session")
def draft_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is right about half the time; beside it `NAME` for each method that is trained."""
    root = tmp_path_factory.mktemp("drafts")
    target, data = write_model(root / "target"), root / "data.jsonl"
    row = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Once upon a time"}]
    }
    data.write_text((json.dumps(row) + "\n") * 8)
    # such settings as say more about a tiny model than the defaults
    few: dict[str, Any] = {"draft_vocab_size": 100}
    own: dict[str, dict[str, Any]] = {"draft_model": {"num_layers": 1}}
    for method in training.available():
        kind = importlib.import_module(f"outpace.training.methods.{method}").Settings
        settings = (few if issubclass(kind, training.HeadSettings) else {}) | own.get(method, {})
        train(
            TrainConfig(
                method,
                str(data),
                root / method,
                model=str(target),
                max_steps=2,
                settings=settings,
                max_len=64,
                batch_tokens=64,
                dtype="float32",
                hidden_cache="none",
            )
        )
    return write_model(root / "half_right", noise=0.3)


def drafts_for(directory: Path) -> str | None:
    """The proposer that a directory is for; None where it is a model that drafts nothing."""
    section = json.loads((directory / "config.json").read_text()).get("speculators_config", {})
    algorithm: str | None = section.get("algorithm")
    return algorithm


def settings_of(method: str, draft_model: Path) -> dict[str, Any]:
    """What a method needs beside its name."""
    directories = [draft_model.parent / name for name in training.available()]
    trained = {drafts_for(directory): {"spec_model": str(directory)} for directory in directories}
    needs: dict[str | None, dict[str, Any]] = trained | {
        "draft_model": {"spec_model": str(draft_model)},
        # by its path a method like any other: only its name stands for synthetic verification, too
        "synthetic": {"spec_method": "outpace.spec.proposers.synthetic"},
    }
    return {key: value for name in method.split(",") for key, value in needs.get(name, {}).items()}


def test_what_is_trained_is_a_draft_with_a_proposer_of_its_name_or_a_model(draft_model: Path) -> None:
    for name in training.available():
        directory = draft_model.parent / name
        if drafts_for(directory) is None:
            load_weights(directory, load_config(directory), torch.float32)
        else:
            assert drafts_for(directory) == name
            assert name in proposers.available()


def speculating(method: str, most: int, draft_model: Path, **settings: Any) -> Engine:
    engine = tiny_engine(**{"spec_method": method, **settings_of(method, draft_model), **settings})
    engine.proposer = Checked(engine.proposer, engine.kv.blocks)
    engine.policy = Limits(most)
    return engine


def reachable(root: Any) -> list[Any]:
    """All objects that an object holds on to, code and tensors aside."""
    found: dict[int, Any] = {}
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) not in found and not isinstance(item, ModuleType | FunctionType | type | torch.Tensor):
            found[id(item)] = item
            waiting.extend(gc.get_referents(item))
            waiting.extend(item if isinstance(item, dict) else ())  # keys that are strings are not referents
    return list(found.values())


def check_forgotten(proposer: Proposer, request_ids: set[str]) -> None:
    """Nothing in a proposer is about the given requests any more."""
    for item in reachable(proposer):
        assert not isinstance(item, Sequence), f"{item.id} is kept"
        assert not isinstance(item, str) or item not in request_ids, f"{item} is kept"


@pytest.fixture(scope="module", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def expected(request: pytest.FixtureRequest) -> tuple[SamplingParams, list[list[int]]]:
    """What is answered without speculation."""
    return request.param, answers(tiny_engine(), request.param)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("most", [0, 1, 7])
def test_answers_are_those_without_drafts_and_trees_obey_their_limits(
    expected: Any, method: str, most: int, draft_model: Path
) -> None:
    sampling, plain = expected
    assert answers(speculating(method, most, draft_model), sampling, stagger=2) == plain


@pytest.mark.parametrize("method", METHODS)
def test_drafts_change_nothing_where_blocks_are_short(expected: Any, method: str, draft_model: Path) -> None:
    sampling, plain = expected
    engine = speculating(method, 7, draft_model, num_blocks=16)
    assert answers(engine, sampling) == plain
    assert engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_request_that_ended_leaves_nothing_behind(method: str, draft_model: Path) -> None:
    engine = speculating(method, 5, draft_model)
    for number, prompt in enumerate(PROMPTS):
        submit(engine, str(number), prompt, GREEDY)
    for number in range(0, len(PROMPTS), 2):
        for _ in range(3):
            engine.step()
        engine.abort(f"{number}-0")
    run(engine)
    check_forgotten(engine.proposer, {f"{number}-0" for number in range(len(PROMPTS))})


def test_these_checks_notice_what_they_look_for() -> None:
    guesser = Guesser({"0-0": [1, 2, 3]})
    blocks = BlockManager(num_blocks=1)
    sequence = Sequence.start(tiny_engine().admission.requests("0", [1], GREEDY)[0])
    assert len(Checked(guesser, blocks).propose([sequence], [5])[0]) == 5
    guesser.propose = lambda sequences, limits: [DraftTree.chain((1, 2, 3))]  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        Checked(guesser, blocks).propose([sequence], [2])
    with pytest.raises(AssertionError, match="the same token"):
        check_tree(DraftTree((-1, -1), (7, 7)))
    with pytest.raises(AssertionError, match="0-0 is kept"):
        check_forgotten(guesser, {"0-0"})
