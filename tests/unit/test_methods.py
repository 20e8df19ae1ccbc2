"""Several draft methods under goodput: who is asked, whose draft is taken, and no answer depends on it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from outpace.config import SpeculativeConfig
from outpace.policy.allocation import Choice, Costs, Slots, allocate
from outpace.policy.base import BatchView, MethodRecord, PolicyContext, SequenceView, StepRecord, load_policy
from outpace.policy.cost import CostModel
from outpace.policy.methods import Curves, Market, Methods
from outpace.policy.simulate import Acceptance, Arrival, Drafter, Fate, Machine, Result, Workload, simulate
from outpace.request import Speculation
from outpace.spec.several import Several, outcome
from outpace.tree import EMPTY_TREE, DraftTree
from tiny import GREEDY, PROMPTS, SAMPLED, answers, run, tiny_engine, tokens

NAMES = ("suffix", "prompt_lookup")
COSTLY = (0.0, 2e-4, 5e-5, 5e-4, 0.0)  # per step, sequence, node, depth and token to catch up with
CHEAP = (0.0, 1e-5, 0.0, 0.0, 0.0)


def serve(
    drafters: dict[str, Drafter], own: tuple[str, ...] = (), concurrency: int = 4, num_requests: int = 12
) -> Result:
    """A closed loop under goodput; `own` are the methods that requests insist on."""
    cost = CostModel(
        [1, 2, 4, 8, 16, 32, 64, 128, 512],
        [0.0125, 0.0130, 0.0142, 0.0165, 0.0215, 0.033, 0.060, 0.115, 0.45],
        per_pair=2e-7,
        host=(5e-4, 3e-5),
    )
    config = SpeculativeConfig(method=",".join(drafters), num_speculative_tokens=7)
    wanted = itertools.islice(itertools.cycle(own or ("",)), num_requests)
    arrivals = tuple(Arrival(0.0, 50, 800, method) for method in wanted)
    return simulate(
        Machine(cost, noise=0.05),
        Workload(arrivals, concurrency=concurrency, drafters=drafters),
        lambda known: load_policy("goodput", PolicyContext(config, cost_model=lambda: known)),
    )


def shares(result: Result) -> dict[str, float]:
    """By method the share of sampling sequences that it was asked for."""
    asked: Counter[str] = Counter()
    for step in result.steps:
        asked.update(step.num_asked)
    return {name: asked[name] / sum(step.num_sequences for step in result.steps) for name in asked}


def rate_between(result: Result, since_s: float, until_s: float) -> float:
    steps = [step for step in result.steps if since_s <= step.time_s < until_s]
    return sum(step.num_tokens for step in steps) / sum(step.seconds for step in steps)


# --- The choice -----------------------------------------------------------------------------------------


def test_where_each_method_suits_some_requests_each_gets_those() -> None:
    drafters = dict.fromkeys(NAMES, Drafter((Acceptance((0.5,), spread=0.4),), COSTLY))
    luck = [[Fate.draw(800, 0, request, method).luck for method in range(2)] for request in range(12)]
    oracle = serve(drafters, tuple(NAMES[np.argmax(pair)] for pair in luck)).tokens_per_s
    alone = [serve(drafters, (name,)).tokens_per_s for name in NAMES]
    learned = serve(drafters)
    assert learned.tokens_per_s > 0.96 * oracle
    assert learned.tokens_per_s > max(alone)
    assert sum(shares(learned).values()) < 1.1, "asking both costs too much"


def test_methods_that_are_free_are_all_asked_and_the_better_tree_is_taken() -> None:
    drafters = dict.fromkeys(NAMES, Drafter((Acceptance((0.5,), spread=0.4),), CHEAP))
    alone = [serve(drafters, (name,), num_requests=4).tokens_per_s for name in NAMES]
    both = serve(drafters, num_requests=4)
    assert min(shares(both).values()) > 0.95
    assert both.tokens_per_s > 1.05 * max(alone)


def test_a_method_that_costs_and_is_of_no_use_is_hardly_asked() -> None:
    good, useless = (
        Drafter((Acceptance((0.7,)),), CHEAP),
        Drafter((Acceptance((0.05,)),), (0, 1e-4, 0, 3e-3, 0)),
    )
    drafters = {"suffix": good, "self_draft": useless}
    both = serve(drafters, concurrency=2, num_requests=8)
    without = serve(drafters, ("suffix",), concurrency=2, num_requests=8)
    assert shares(both)["suffix"] > 0.95
    assert shares(both)["self_draft"] < 0.03
    assert both.tokens_per_s > 0.97 * without.tokens_per_s


def test_when_another_method_becomes_the_better_one_it_is_found() -> None:
    phases = [(0.8,), (0.1,)]
    change_s = 10.0
    first, second = (
        Drafter((Acceptance(rates), Acceptance(then, since_s=change_s)), COSTLY)
        for rates, then in (phases, phases[::-1])
    )
    result = serve(dict(zip(NAMES, (first, second), strict=True)), concurrency=2, num_requests=12)
    before, after = rate_between(result, 4, change_s), rate_between(result, change_s + 5, change_s + 9)
    assert after > 0.9 * before


class Priced:
    """The argmax over slots at a fixed target cost."""

    row_s, fixed_s = 1.5e-3, 0.012

    def __call__(self, slots: Slots, draft_s) -> Choice:  # type: ignore[no-untyped-def]
        costs = Costs(lambda extra: self.fixed_s + self.row_s * extra.rows + draft_s(extra))
        return allocate(slots, float(len(slots.gain)), costs, 0.0, 1e9)


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_nearly_as_good_as_the_best_of_all_assignments(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_sequences, num_nodes, price = 3, 3, Priced()
    most = (1e-3, 2e-3, 3e-4, 2e-3, 0.0)  # per step, sequence, node, depth and token to catch up with
    costs = [tuple(rng.uniform(0, most)) for _ in NAMES]
    methods, view = known_methods(costs, num_nodes, num_sequences)
    size = num_sequences, num_nodes
    survival = {name: np.cumprod(rng.uniform(0.1, 0.95, size), axis=1) for name in NAMES}
    lengths = np.full(num_sequences, num_nodes)
    methods._curves = lambda name, *_: Curves(survival[name], np.ones_like(survival[name]), lengths)  # type: ignore
    market = Market(price.fixed_s, price.row_s, [1.0] * num_sequences, price)
    found = methods.ask(view, [num_nodes] * num_sequences, market)

    options = [(None, 0), *itertools.product(range(2), range(1, num_nodes + 1))]
    best = 0.0
    for assignment in itertools.product(options, repeat=num_sequences):
        tokens_, seconds = float(num_sequences), price.fixed_s
        for m, name in enumerate(NAMES):
            counts = [n for of, n in assignment if of == m]
            seconds += price.row_s * sum(counts)
            amounts = (bool(counts), len(counts), sum(counts), max(counts, default=0), 0)
            seconds += float(np.dot(costs[m], amounts))
            tokens_ += sum(survival[name][i, :n].sum() for i, (of, n) in enumerate(assignment) if of == m)
        best = max(best, tokens_ / seconds)
    assert 0.97 * best < found <= best * (1 + 1e-5), "costs are learnt, not given"


def known_methods(
    costs: Sequence[tuple[float, ...]], most: int, num_sequences: int, streams_s: float = 0.0
) -> tuple[Methods, BatchView]:
    """Methods whose costs were seen, and a view whose sequences they have read; the first has streams."""
    sequences = tuple(SequenceView(str(i), 10, 100) for i in range(num_sequences))
    view = BatchView(sequences, num_sequences, 10 * num_sequences, 1000)
    methods, rng = Methods(NAMES, most), np.random.default_rng(0)
    for _ in range(400):
        limits = tuple(int(n) for n in rng.integers(0, most + 1, num_sequences))
        if not any(limits):
            continue
        empty, nothing = (EMPTY_TREE,) * num_sequences, (0,) * num_sequences
        no_paths = ((),) * num_sequences
        records = tuple(
            MethodRecord(
                name,
                limits,
                empty,
                nothing,
                no_paths,
                (False,) * num_sequences,
                float(np.dot(cost, (1, sum(map(bool, limits)), sum(limits), max(limits), 0))),
                has_streams=name == NAMES[0],
            )
            for name, cost in zip(NAMES, costs, strict=True)
        )
        record = StepRecord(view, limits, empty, no_paths, {"total": 0.01}, 3, 3, methods=records)
        methods.observe(record, streams_s)
    return methods, view


@pytest.mark.parametrize(("streams_s", "free"), [(0.0, set(NAMES)), (3e-3, {NAMES[1]})])
def test_what_streams_add_to_the_pass_is_a_cost_of_the_method_that_has_them(
    streams_s: float, free: set[str]
) -> None:
    methods, view = known_methods([(0,) * 5] * 2, 4, 3, streams_s)
    methods.ask(view, [4] * 3, Market(0.012, 1e-4, [1.0] * 3, Priced()))
    assert {name for name, limits in methods.asked.items() if all(limits)} == free


def test_a_request_that_insists_on_a_method_is_drafted_for_by_that_one_alone() -> None:
    methods, view = known_methods([(0, 1e-3, 0, 0, 0), (0,) * 5], 4, 3)
    own = tuple(s._replace(method=m) for s, m in zip(view.sequences, ("", *NAMES), strict=True))
    market = Market(0.012, 1e-4, [1.0] * 3, Priced())
    methods.ask(BatchView(own, 3, 30, 1000), [4] * 3, market)
    assert methods.asked.get("suffix", [0] * 3)[2] == 0
    assert methods.asked["prompt_lookup"] == [4, 0, 4], "it is free: all that leave the choice are asked"
    methods, view = known_methods([(0, 1e-3, 0, 0, 0), (0, 1e-4, 0, 0, 0)], 4, 3)
    allowed = {"suffix": np.array([4, 4, 0]), "prompt_lookup": np.array([4, 0, 4])}
    rows = {name: np.repeat(lengths[:, None] / 4, 4, axis=1) for name, lengths in allowed.items()}
    methods._curves = lambda name, *_: Curves(0.9 * rows[name], rows[name], allowed[name])  # type: ignore
    methods.ask(BatchView(own, 3, 30, 1000), [4] * 3, market)
    assert methods.asked["prompt_lookup"] == [4, 0, 4]
    assert methods.asked["suffix"] == [0, 4, 0]


def test_of_trees_that_came_the_one_that_wins_most_beyond_its_rows_is_taken() -> None:
    methods, _ = known_methods([(0.0,) * 5] * 2, 4, 2)
    long, short = DraftTree.chain((1, 2, 3, 4)), DraftTree.chain((1,))
    drafts = {"suffix": [long, EMPTY_TREE], "prompt_lookup": [short, short]}
    assert methods.pick(["0", "1"], drafts, 0.1) == ["suffix", "prompt_lookup"]
    assert [len(row) for row in methods.survival(["0", "1"], [long, short])] == [4, 1]
    assert [len(row) for row in methods.survival(["new"], [short])] == [1], "one that no method has made"


# --- What would have become of a draft ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "token_ids", "expected"),
    [
        (DraftTree.chain((1, 2, 3)), (1, 2, 9), (3, (0, 1))),
        (DraftTree.chain((1, 2, 3)), (1,), (1, (0,))),
        (DraftTree.chain((1, 2, 3)), (7, 8), (2, ())),
        (DraftTree((-1, -1, 1, 1), (1, 2, 3, 4)), (2, 4), (4, (1, 3))),
        (
            DraftTree((-1, 0, 1, -1), (5, 6, 7, 1)),
            (1, 9),
            (2, ()),
        ),  # the last comes after an unknown one
        (EMPTY_TREE, (1,), (0, ())),
    ],
)
def test_tokens_tell_of_a_draft_as_deep_as_they_reach(
    tree: DraftTree, token_ids: tuple[int, ...], expected: tuple[int, tuple[int, ...]]
) -> None:
    assert outcome(tree, token_ids) == expected


# --- The engine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["goodput", "fixed", "fair"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_those_without_drafts_and_both_methods_are_used(policy: str, sampling) -> None:  # type: ignore[no-untyped-def]
    engine = tiny_engine(spec_method="suffix,self_draft", spec_policy=policy, spec_tokens=3)
    assert answers(engine, sampling) == answers(tiny_engine(), sampling)
    by_method = engine.metrics.drafts_by_method
    assert list(by_method) == ["suffix", "self_draft"]
    assert all(drafts.num_draft_tokens > 0 for drafts in by_method.values())
    total = sum(drafts.num_accepted_tokens for drafts in by_method.values())
    assert total == engine.metrics.drafts.num_accepted_tokens
    counted = {
        sample.labels["method"]: sample.value
        for family in engine.metrics.collect()
        for sample in family.samples
        if sample.name == "outpace:spec_decode_num_draft_tokens_by_method_total"
    }
    assert counted == {name: drafts.num_draft_tokens for name, drafts in by_method.items()}


def test_a_method_that_the_policy_leaves_out_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(spec_method="suffix,self_draft")
    assert isinstance(engine.proposer, Several)
    monkeypatch.setattr(engine.policy, "methods", lambda view: {"suffix": [2] * len(view.sequences)})
    asked: list[list[int]] = []
    proposer = engine.proposer._proposers["self_draft"]
    monkeypatch.setattr(proposer, "propose", lambda _, limits: asked.append(limits))
    assert answers(engine, GREEDY) == answers(tiny_engine(), GREEDY)
    assert asked == []
    assert engine.metrics.drafts.num_draft_tokens > 0


def test_with_goodput_a_request_still_gets_the_method_it_names() -> None:
    engine = tiny_engine(spec_method="suffix,self_draft", spec_policy="goodput")
    ids = engine.tokenizer.encode(PROMPTS[0])
    engine.add(engine.admission.requests("r", ids, GREEDY, speculation=Speculation(method="self_draft")))
    (outputs,) = run(engine).values()
    assert tokens(outputs) == answers(tiny_engine(), GREEDY)[0]
    assert engine.metrics.drafts_by_method["suffix"].num_drafts == 0
    assert engine.metrics.drafts_by_method["self_draft"].num_drafts > 0


def test_one_method_is_not_told_apart() -> None:
    metrics = tiny_engine(spec_method="suffix").metrics
    assert not [family for family in metrics.collect() if family.name.endswith("_by_method")]
