"""What every speculation policy must keep. The files in policy/ are found by themselves."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from outpace.config import EngineConfig, SpeculativeConfig
from outpace.policy import base as policies
from outpace.policy.base import (
    BatchView,
    Draft,
    MethodRecord,
    PolicyContext,
    SequenceView,
    SpeculationPolicy,
    StepRecord,
    load_policy,
)
from outpace.sampling import SamplingParams
from outpace.tree import DraftTree
from tiny import GREEDY, SAMPLED, Guesser, answers, cost_model, tiny_engine

POLICIES = policies.available()
PHASES = ("between", "plan", "policy", "propose", "forward", "verify", "advance")
CONTEXT = PolicyContext(
    engine=EngineConfig(spec_policy="slo", slo_ttft_ms=500, slo_tpot_ms=50), cost_model=cost_model
)
METHODS = ("suffix", "prompt_lookup", "self_draft")
OF_SEVERAL = replace(CONTEXT, speculative=SpeculativeConfig(method=",".join(METHODS)))


def random_view(rng: random.Random) -> BatchView:
    """A step of up to 64 sequences, of which some have no use for a draft."""
    sequences = tuple(
        SequenceView(
            f"{i}-0",
            rng.randrange(4000),
            rng.choice([0, 1, rng.randrange(200)]),
            client=rng.choice(["", "a", "b"]),
            num_output=rng.randrange(100),
            decode_s=rng.random(),
            method=rng.choice(["", "", *METHODS]),
        )
        for i in range(rng.choice([0, 1, 2, 8, 64]))
    )
    num_context = sum(sequence.context_len for sequence in sequences)
    num_prefill = rng.choice([0, 1, 512])
    return BatchView(
        sequences,
        num_rows=max(len(sequences) + num_prefill, 1),
        num_context=num_context,
        num_free_slots=rng.choice([0, 5, 10_000]),
        num_pairs=num_context,
        num_scheduled=len(sequences) + (num_prefill > 0),
        num_waiting=rng.randrange(3),
        oldest_wait_s=rng.random(),
    )


def random_tree(rng: random.Random, num_nodes: int) -> DraftTree:
    """Any shape, with confidences or without."""
    parents = tuple(rng.randrange(-1, node) for node in range(num_nodes))
    confidence = tuple(rng.random() for _ in parents) if rng.random() < 0.8 else None
    return DraftTree(parents, tuple(range(num_nodes)), confidence)


def random_path(rng: random.Random, draft: Draft) -> tuple[int, ...]:
    """A path from the root of a tree to anywhere."""
    path: list[int] = []
    for node, parent in enumerate(draft.parents):
        if parent == (path[-1] if path else -1) and rng.random() < 0.6:
            path.append(node)
    return tuple(path)


def random_record(
    rng: random.Random,
    view: BatchView,
    limits: list[int],
    drafts: list[DraftTree],
    predicted_s: float | None,
    methods: tuple[MethodRecord, ...] = (),
) -> StepRecord:
    """What may have become of the drafts."""
    seconds = {phase: rng.uniform(1e-4, 2e-2) for phase in PHASES}
    paths = tuple(random_path(rng, draft) for draft in drafts)
    return StepRecord(
        view=view,
        limits=tuple(limits),
        drafts=tuple(drafts),
        paths=paths,
        seconds={**seconds, "total": sum(seconds.values())},
        num_rows=view.num_rows + sum(map(len, drafts)),
        num_tokens=len(drafts) + sum(map(len, paths)),
        predicted_s=predicted_s,
        methods=methods,
    )


def draft_by_methods(
    rng: random.Random, policy: SpeculationPolicy, view: BatchView, limits: list[int]
) -> tuple[list[DraftTree], tuple[MethodRecord, ...]]:
    """Asks methods as the policy wants, checks that and its pick, and says what each of them did."""
    wanted = policy.methods(view)
    asked = dict.fromkeys(METHODS, limits) if wanted is None else wanted
    assert set(asked) <= set(METHODS)
    for mine in asked.values():
        assert all(0 <= k <= most for k, most in zip(mine, limits, strict=True))
    if wanted is not None:
        for name, mine in wanted.items():
            assert not any(k for k, s in zip(mine, view.sequences, strict=True) if s.method not in ("", name))
    asked = {name: mine for name, mine in asked.items() if any(mine)}
    trees = {name: [random_tree(rng, rng.randint(0, k)) for k in mine] for name, mine in asked.items()}
    picked = policy.pick(view, trees) or [next(iter(trees), "")] * len(limits)
    assert not trees or set(picked) <= set(trees)
    drafts = [trees[name][i] if trees else DraftTree() for i, name in enumerate(picked)]
    records = tuple(
        MethodRecord(
            name,
            tuple(asked[name]),
            tuple(trees[name]),
            tuple(map(len, trees[name])),
            tuple(random_path(rng, tree) for tree in trees[name]),
            tuple(chosen == name for chosen in picked),
            rng.uniform(1e-5, 1e-2),
        )
        for name in trees
    )
    return drafts, records


def drive(policy: SpeculationPolicy, seed: int, num_steps: int = 60, of_several: bool = False) -> list[Any]:
    """Takes a policy through random steps, checks each of its answers and gives all of them."""
    rng = random.Random(seed)
    said: list[Any] = []
    for _ in range(num_steps):
        view = random_view(rng)
        limits = policy.limits(view)
        assert len(limits) == len(view.sequences)
        assert all(0 <= k <= s.max_draft for k, s in zip(limits, view.sequences, strict=True))
        assert all(type(limit) is int for limit in limits), "limits go into JSON"
        methods: tuple[MethodRecord, ...] = ()
        if of_several:
            drafts, methods = draft_by_methods(rng, policy, view, limits)
        else:
            drafts = [random_tree(rng, rng.randint(0, limit)) for limit in limits]
        kept = policy.trim(view, drafts)
        if kept is not None:
            assert len(kept) == len(drafts)
            assert all(type(num) is int and num >= 0 for num in kept)
            drafts = [draft.cut(num) for draft, num in zip(drafts, kept, strict=True)]
        assert policy.predicted_s is None or policy.predicted_s > 0
        policy.observe(random_record(rng, view, limits, drafts, policy.predicted_s, methods))
        for sequence in view.sequences:
            if rng.random() < 0.05:
                policy.release(sequence.id)
        said += [limits, kept, [(method.name, method.limits, method.taken) for method in methods]]
    return said


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_each_sequence_gets_a_limit_that_is_of_use_to_it(name: str, seed: int) -> None:
    drive(load_policy(name, CONTEXT), seed)


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_steps_get_the_same_answers(name: str) -> None:
    assert drive(load_policy(name, CONTEXT), 7) == drive(load_policy(name, CONTEXT), 7)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(2))
def test_of_several_methods_those_are_asked_that_a_request_allows(name: str, seed: int) -> None:
    first, second = (drive(load_policy(name, OF_SEVERAL), seed, 120, of_several=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", POLICIES)
def test_no_torch_is_needed(name: str) -> None:
    code = (
        "import sys; from outpace.config import EngineConfig\n"
        "from outpace.policy.base import PolicyContext, load_policy\n"
        "from outpace.policy.cost import CostModel\n"
        "engine, cost = EngineConfig(), lambda: CostModel([1, 2], [1.0, 2.0])\n"
        f"load_policy({name!r}, PolicyContext(engine=engine, cost_model=cost))"
    )
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_those_without_speculation(name: str, sampling: SamplingParams) -> None:
    plain = answers(tiny_engine(), sampling)
    targets: dict[str, Any] = {"slo_tpot_ms": 50.0} if name == "slo" else {}
    engine = tiny_engine(spec_policy=name, **targets)
    engine.proposer = Guesser({f"{number}-0": known for number, known in enumerate(plain)})
    assert answers(engine, sampling) == plain


class Careless(SpeculationPolicy):
    """Allows the same whatever is of use."""

    def limits(self, view: BatchView) -> list[int]:
        return [3] * len(view.sequences)


def test_these_checks_notice_what_they_look_for() -> None:
    with pytest.raises(AssertionError):
        drive(Careless(), 0)
