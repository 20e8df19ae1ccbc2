"""What each policy decides, on views made by hand."""

from __future__ import annotations

import copy
import statistics
from dataclasses import replace

import numpy as np
import pytest

from outpace.config import EngineConfig, SpeculativeConfig
from outpace.errors import ConfigError
from outpace.policy.base import BatchView, PolicyContext, SequenceView, StepRecord, Wait, load_policy
from outpace.policy.batch_table import profiled_table
from outpace.policy.cost import CostModel
from outpace.policy.fair import ProportionalFairness
from outpace.policy.goodput import HOLD, Equal, GoodputPolicy
from outpace.policy.nightjar import NightjarPolicy
from outpace.policy.slo import LEAST, Targets
from outpace.policy.smartspec import accepted_length, latency_regression
from outpace.tree import EMPTY_TREE, DraftTree

FREE = CostModel([1, 1000], [0.010, 0.0101])  # rows cost next to nothing
DEAR = CostModel([1, 1000], [0.001, 1.0], draft=(0, 1e-9, 0, 0, 0))  # a step costs what its rows cost
COSTLY_DRAFTS = CostModel([1, 1000], [0.001, 1.0], draft=(0, 1e-4, 0, 0, 0))


def context(cost: CostModel, method: str = "prompt_lookup", **engine: float | str) -> PolicyContext:
    speculative = SpeculativeConfig(method=method, num_speculative_tokens=4)
    return PolicyContext(speculative, EngineConfig(**engine), lambda: copy.deepcopy(cost))  # type: ignore[arg-type]


def view(num_sequences: int, max_draft: int = 100, client: str = "") -> BatchView:
    sequences = tuple(SequenceView(f"{i}", 50, max_draft, client) for i in range(num_sequences))
    return BatchView(sequences, num_sequences, 50 * num_sequences, 1000, 50 * num_sequences, num_sequences)


def record(
    seen: BatchView,
    limits: list[int],
    num_accepted: int,
    seconds: float = 0.01,
    drafted: list[int] | None = None,
) -> StepRecord:
    """Chains of which the first `num_accepted` nodes were accepted."""
    lengths = limits if drafted is None else drafted
    paths = tuple(tuple(range(min(num_accepted, length))) for length in lengths)
    return StepRecord(
        seen,
        tuple(limits),
        tuple(DraftTree.chain((0,) * length) for length in lengths),
        paths,
        {"forward": seconds, "total": seconds},
        seen.num_rows + sum(lengths),
        len(limits) + sum(map(len, paths)),
    )


def live(policy: GoodputPolicy, num_sequences: int, num_accepted: int, num_steps: int) -> list[list[int]]:
    """Steps in which every draft comes in full; the nodes verified at each."""
    said = []
    for _ in range(num_steps):
        seen = view(num_sequences)
        limits = policy.limits(seen)
        kept = policy.trim(seen, [DraftTree.chain((0,) * limit) for limit in limits])
        drafted = limits if kept is None else [min(a, b) for a, b in zip(limits, kept, strict=True)]
        seconds = float(policy.cost.step_s(shape(seen, drafted), num_sequences, limits))
        policy.observe(record(seen, limits, num_accepted, seconds, drafted))
        said.append(drafted)
    return said


def shape(seen: BatchView, drafted: list[int]):  # type: ignore[no-untyped-def]
    from outpace.policy.cost import Shape

    rows = seen.num_rows + sum(drafted)
    return Shape(rows, rows, seen.num_context, 50 * rows)


# --- goodput --------------------------------------------------------------------------------------------


def test_where_rows_are_free_goodput_drafts_all_it_may() -> None:
    policy = load_policy("goodput", context(FREE))
    assert isinstance(policy, GoodputPolicy)
    assert live(policy, 2, 4, 20)[-1] == [4, 4]


def test_where_rows_cost_as_much_as_tokens_goodput_is_plain_decoding_but_for_probes() -> None:
    for cost in (DEAR, COSTLY_DRAFTS):
        policy = load_policy("goodput", context(cost))
        assert isinstance(policy, GoodputPolicy)
        steps = live(policy, 8, 0, 2000)
        assert all(sum(drafted) == 0 for drafted in steps[:20])
        num_probed, num_rows = sum(map(sum, steps)), 8 * len(steps)
        assert 0.002 * num_rows < num_probed < 0.006 * num_rows


def test_when_nothing_is_ever_accepted_it_stops_within_thirty_steps() -> None:
    cost = CostModel([1, 2, 1000], [0.010, 0.0105, 0.5])
    policy = load_policy("goodput", context(cost))
    assert isinstance(policy, GoodputPolicy)
    steps = live(policy, 4, 0, 60)
    assert sum(steps[0]) > 0
    assert sum(map(sum, steps[30:])) <= 4, "only probes"


def test_a_probe_waits_for_a_method_that_drafts_a_step_after_it_is_asked() -> None:
    policy = load_policy("goodput", context(COSTLY_DRAFTS))
    assert isinstance(policy, GoodputPolicy)
    asked: list[int] = [0] * 8
    num_asked = num_drafts = 0
    for _ in range(2000):
        seen = view(8)
        limits = policy.limits(seen)
        lengths = [limit if before else 0 for limit, before in zip(limits, asked, strict=True)]
        kept = policy.trim(seen, [DraftTree.chain((0,) * length) for length in lengths]) or [0] * 8
        drafted = [min(pair) for pair in zip(lengths, kept, strict=True)]
        done = record(seen, limits, 0, 0.0, drafted)
        forward, propose = 0.001 * done.num_rows, 0.004 * sum(map(bool, limits))
        total = {"forward": forward, "propose": propose, "total": forward + propose}
        policy.observe(replace(done, seconds=total))
        asked = limits
        num_asked += sum(map(bool, limits))
        num_drafts += sum(map(bool, lengths))
    assert num_asked < 0.1 * 8 * 2000, "drafting does not pay"
    assert num_drafts > 0.4 * num_asked > 4, "every probe sees its draft"
    present, _ = policy.acceptance.before(["0"])
    assert present[0][0] > 0.9


def test_the_rows_of_a_probe_are_in_the_predicted_time() -> None:
    policy = load_policy("goodput", context(DEAR))  # 1 ms a row
    for _ in range(1000):
        seen = view(8)
        limits = policy.limits(seen)
        kept = policy.trim(seen, [DraftTree.chain((0,) * limit) for limit in limits]) or [0] * 8
        if any(kept):
            break
        policy.observe(record(seen, limits, 0, 0.008, kept))
    assert sum(kept) == 2, "nothing is worth its row, so it is a probe"
    assert policy.predicted_s == pytest.approx(0.010, rel=0.01)


def test_the_price_of_rows_is_the_tokens_that_their_time_would_have_given() -> None:
    # 1 ms a row: four sequences alone give a token per millisecond, so a row costs a token
    policy = load_policy("goodput", context(COSTLY_DRAFTS))
    policy.limits(view(4))
    assert policy.prices(4, [8, 0, 2]) == pytest.approx([8.0, 0.0, 2.0], rel=0.01)
    policy = load_policy("goodput", context(FREE))
    policy.limits(view(4))
    assert 0 < policy.prices(4, [8])[0] < 0.001
    assert load_policy("fixed", context(DEAR)).prices(4, [8, 9]) == [0.0, 0.0]


def test_a_bypassed_step_has_no_drafts_to_cut() -> None:
    policy = load_policy("goodput", context(COSTLY_DRAFTS))
    seen = view(4)
    assert policy.limits(seen) == [0] * 4
    assert policy.trim(seen, [EMPTY_TREE] * 4) is None
    assert policy.predicted_s == pytest.approx(0.004)


def test_free_cache_slots_are_not_exceeded() -> None:
    policy = load_policy("goodput", context(FREE))
    seen = view(3)
    short = BatchView(seen.sequences, 3, 150, 2, 150, 3)
    policy.limits(short)
    kept = policy.trim(short, [DraftTree.chain((0,) * 4)] * 3)
    assert kept is not None
    assert sum(kept) <= 2


def test_a_draft_model_that_must_read_prompts_first_is_given_the_time_to_show_what_it_usually_costs() -> None:
    truth = CostModel([1, 64, 1000], [0.010, 0.012, 0.5], draft=(0, 0, 0, 2e-4, 1e-4))
    policy = load_policy("goodput", context(CostModel([1, 64, 1000], [0.010, 0.012, 0.5])))
    seen: dict[str, int] = {}
    said = []
    for step in range(60):
        sequences = tuple(SequenceView(str(i), 500 + 3 * step, 100) for i in range(4))
        at_hand = BatchView(sequences, 4, 2000, 1000, 2000, 4)
        limits = policy.limits(at_hand)
        kept = policy.trim(at_hand, [DraftTree.chain((0,) * limit) for limit in limits]) or limits
        drafted = [min(pair) for pair in zip(limits, kept, strict=True)]
        asked = [s for s, limit in zip(sequences, limits, strict=True) if limit]
        behind = sum(s.context_len - seen.get(s.id, 0) for s in asked)
        seen.update((s.id, s.context_len) for s in asked)
        propose = float(truth.draft_s(len(asked), sum(limits), max(limits), behind))
        seconds = {"forward": 0.011, "propose": propose, "total": 0.011 + propose}
        policy.observe(replace(record(at_hand, limits, 3, drafted=drafted), seconds=seconds))
        said.append(sum(drafted))
    assert min(said[30:]) >= 8, "0.2 s for the prompts are forgotten; what a draft takes now is worth it"


def test_drafts_of_one_sequence_alone_do_not_keep_eight_from_drafting_together() -> None:
    rows = [1, 64, 1000], [0.012, 0.020, 0.3]
    truth = CostModel(*rows, draft=(2e-3, 0, 2e-5, 3e-4, 0))
    policy = load_policy("goodput", context(CostModel(*rows)))
    said = []
    for step in range(200):
        num = 1 if step < 100 else 8
        sequences = tuple(SequenceView(str(i), 100 + step, 100) for i in range(num))
        at_hand = BatchView(sequences, num, 100 * num, 1000, 100 * num, num)
        limits = policy.limits(at_hand)
        trees = [DraftTree.chain((0,) * limit) for limit in limits]
        kept = policy.trim(at_hand, trees) or limits
        drafted = [min(pair) for pair in zip(limits, kept, strict=True)]
        asked = num - limits.count(0)
        propose = float(truth.draft_s(asked, sum(limits), max(limits)))
        forward = float(truth.target_s(num + sum(drafted), num + sum(drafted), 0, 0))
        seconds = {"forward": forward, "propose": propose, "total": forward + propose}
        policy.observe(replace(record(at_hand, limits, 1, drafted=drafted), seconds=seconds))
        said.append(sum(drafted))
    assert min(said[120:]) >= 8, "a token more of each, for 2.5 ms"


def test_what_a_short_draft_costs_is_known_before_long_ones_have_put_one_off() -> None:
    rows = [1, 100], [0.010, 0.080]
    truth = CostModel(*rows)
    policy = GoodputPolicy(10, CostModel(*rows), Equal())
    num_drafts = 0
    for step in range(300):
        seen = view(1)
        limits = policy.limits(seen)
        kept = policy.trim(seen, [DraftTree.chain((0,) * limit) for limit in limits]) or limits
        drafted = [min(pair) for pair in zip(limits, kept, strict=True)]
        propose = 1e-3 * min(limits[0], 4)  # the drafter reaches no deeper
        forward = float(truth.target_s(1 + drafted[0], 1 + drafted[0], 0, 0))
        seconds = {"forward": forward, "propose": propose, "total": forward + propose}
        accepted = int(step % 3 == 0)  # of first nodes; deeper ones never are
        policy.observe(replace(record(seen, limits, accepted, drafted=drafted), seconds=seconds))
        num_drafts += step >= 100 and limits[0] > 0
    assert num_drafts > 180, "1.33 tokens in 11.7 ms instead of 1 in 10"


# --- smartspec ------------------------------------------------------------------------------------------


def test_smartspec_expects_a_geometric_number_of_tokens() -> None:
    assert accepted_length(0.5, 2) == pytest.approx(1 + 0.5 + 0.25)
    assert accepted_length(0.7, 0) == 1
    assert accepted_length(1.0, 3) == 4


def test_smartspec_fits_context_tokens_and_a_constant() -> None:
    cost = CostModel([1, 513], [0.010, 0.010 + 512e-4], per_context=2e-7)
    per_context, per_token, fixed = latency_regression(cost)
    assert per_context == pytest.approx(2e-7, rel=0.01)
    assert per_token == pytest.approx(1e-4, rel=0.01)
    assert fixed == pytest.approx(0.010 - 1e-4, rel=0.01)


def test_smartspec_chooses_one_length_for_all_and_decides_every_twenty_steps() -> None:
    policy = load_policy("smartspec", context(FREE, method="self_draft"))
    said = []
    for _ in range(41):
        said.append(policy.limits(view(2)))
        policy.observe(record(view(2), said[-1], 0))
    assert said[0] == [4, 4]
    assert all(limits == said[0] for limits in said[:20])
    assert said[20] == said[40] == [0, 0], "nothing was accepted, and k = 0 has a bonus"


def test_smartspec_for_lookup_proposes_all_and_verifies_what_pays() -> None:
    free, dear = (load_policy("smartspec", context(cost)) for cost in (FREE, DEAR))
    for policy, expected in ((free, [4, 0, 2]), (dear, [0, 0, 0])):
        assert policy.limits(view(3)) == [4, 4, 4]
        drafts = [DraftTree.chain((0,) * 4), EMPTY_TREE, DraftTree.chain((0, 0))]
        assert policy.trim(view(3), drafts) == expected
    assert free.limits(view(33)) == [0] * 33


# --- batch_table ----------------------------------------------------------------------------------------


def test_the_profiled_table_drafts_less_for_larger_batches() -> None:
    cost = CostModel([1, 8, 64, 1024], [0.010, 0.011, 0.050, 0.8])
    table = profiled_table(cost, 64, 8)
    assert list(table) == [1, 2, 4, 8, 16, 32, 64]
    lengths = list(table.values())
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] >= 6
    assert lengths[-1] == 0


def test_a_declared_table_is_looked_up_by_the_sequences_that_sample() -> None:
    rows = [[1, 4, 5], [5, 16, 2], [17, 512, 0]]
    config = SpeculativeConfig(num_speculative_tokens_per_batch_size=rows)  # type: ignore[arg-type]
    policy = load_policy("batch_table", PolicyContext(config))
    assert [policy.limits(view(n))[0] for n in (1, 4, 5, 16, 17, 64, 1000)] == [5, 5, 2, 2, 0, 0, 0]
    assert policy.limits(view(2, max_draft=1)) == [1, 1]


@pytest.mark.parametrize(
    "rows", [5, [5], [[1, 4]], [[2, 4, 1]], [[1, 4, 1], [6, 8, 1]], [[1, 0, 1]], [[1, 4, -1]]]
)
def test_a_table_with_gaps_or_other_mistakes_is_refused(rows: object) -> None:
    with pytest.raises(ConfigError, match="num_speculative_tokens_per_batch_size must"):
        SpeculativeConfig(num_speculative_tokens_per_batch_size=rows)  # type: ignore[arg-type]


# --- nightjar -------------------------------------------------------------------------------------------


def test_nightjar_settles_on_the_arm_with_the_least_time_per_token_for_each_batch_size() -> None:
    policy = NightjarPolicy(4)
    best = {2: 3, 8: 0}
    chosen: dict[int, list[int]] = {2: [], 8: []}
    for step in range(6000):
        size = (2, 8)[step // 50 % 2]
        arm = policy.limits(view(size))[0]
        chosen[size].append(arm)
        seconds = 0.01 * size * (1 + arm) * (1.0 + 0.5 * abs(arm - best[size]))
        policy.observe(record(view(size), [arm] * size, arm, seconds))
    for size, arms in chosen.items():
        latest = arms[-1500:]
        assert latest.count(best[size]) > 0.6 * len(latest)


# --- weights --------------------------------------------------------------------------------------------


def test_fairness_weighs_by_what_clients_do_not_get() -> None:
    fairness = ProportionalFairness()
    sequences = tuple(SequenceView(str(i), 10, 9, client) for i, client in enumerate("aab"))
    seen = BatchView(sequences, 3, 30, 100)
    assert fairness.weights(seen)[0] is None, "nothing is known: all are worth the same"
    for _ in range(200):
        fairness.observe(record(seen, [1, 1, 0], 1, 0.1))
    weights = np.array(fairness.weights(seen)[0])
    # a gets two times two tokens per step, b one
    assert weights[2] / weights[0] == pytest.approx(4.0)
    assert weights.mean() == pytest.approx(1.0)


def test_clients_that_left_are_forgotten() -> None:
    fairness = ProportionalFairness()
    fairness.observe(record(view(1, client="gone"), [0], 0))
    for _ in range(100):
        fairness.observe(record(view(1, client="here"), [0], 0, 1.0))
    assert list(fairness._rates) == ["here"]


def test_fair_gives_the_drafts_to_the_client_that_has_less() -> None:
    cost = CostModel([1, 2, 3, 1000], [0.010, 0.0101, 0.016, 5.0])
    policy = load_policy("fair", context(cost))
    sequences = (SequenceView("0", 10, 9, "rich", 50, 1.0), SequenceView("1", 10, 9, "poor", 50, 1.0))
    seen = BatchView(sequences, 2, 20, 100, 20, 2)
    poor = rich = 0
    for step in range(200):
        several = BatchView(sequences[:1], 1, 10, 100, 10, 1) if step < 100 else seen
        limits = policy.limits(several)
        kept = policy.trim(several, [DraftTree.chain((0,) * n) for n in limits]) or limits
        drafted = [min(pair) for pair in zip(limits, kept, strict=True)]
        policy.observe(record(several, limits, 3, 0.01, drafted))
        if 100 <= step < 110:
            rich, poor = rich + drafted[0], poor + drafted[1]
    assert poor > rich


def test_targets_weigh_most_who_is_on_the_brink() -> None:
    targets = Targets(None, 0.050)
    sequences = tuple(
        SequenceView(str(i), 10, 9, num_output=101, decode_s=seconds)
        for i, seconds in enumerate((1.0, 4.5, 5.0, 6.0, 100.0))
    )
    weights = np.array(targets.weights(BatchView(sequences, 5, 50, 100))[0])
    assert weights.argmax() == 2
    assert weights[0] < weights[1] < weights[2] == 1.0
    assert weights[3] < 1.0
    assert weights[4] == LEAST


def test_requests_that_wait_and_can_still_be_in_time_are_at_stake() -> None:
    targets = Targets(0.5, None)

    def waiting(number: int, oldest_s: float) -> float:
        return targets.weights(BatchView((), 1, 0, 0, num_waiting=number, oldest_wait_s=oldest_s))[1]

    assert waiting(0, 0.0) == 0
    assert waiting(4, 0.2) == 4
    assert waiting(4, 2.0) == 1


def test_waiting_prompts_make_steps_shorter() -> None:
    cost = CostModel([1, 4, 1000], [0.010, 0.0115, 5.0])
    lengths = []
    for num_waiting in (0, 50):
        policy = load_policy("slo", context(cost, spec_policy="slo", slo_ttft_ms=500.0))
        seen = view(1)
        crowded = BatchView(seen.sequences, 1, 50, 100, 50, 1, num_waiting, 0.1)
        policy.limits(crowded)
        kept = policy.trim(crowded, [DraftTree.chain((0,) * 4)])
        lengths.append(4 if kept is None else kept[0])
    assert lengths[1] < lengths[0]


def test_a_request_may_bring_targets_of_its_own() -> None:
    sequences = tuple(
        SequenceView(str(i), 10, 9, num_output=101, decode_s=5.0, tpot_s=own)
        for i, own in enumerate((None, 0.050, 0.500))
    )
    seen = BatchView(sequences, 3, 30, 100)
    with_default, without = (Targets(None, default).weights(seen)[0] for default in (0.100, None))
    assert with_default == pytest.approx([0.5, 1.0, LEAST])
    assert without == pytest.approx([LEAST, 1.0, LEAST]), "nothing hangs on the first"
    assert Targets(None, None).weights(BatchView(sequences[:1], 1, 10, 100)) == (None, 0.0)
    young = (SequenceView("0", 10, 9, num_output=1, tpot_s=0.05), SequenceView("1", 10, 9, num_output=1))
    assert Targets(None, None).weights(BatchView(young, 2, 20, 100))[0] == [1.0, LEAST]


def test_waiting_requests_with_their_own_target_are_counted_one_by_one() -> None:
    own = (Wait(0.2, 0.5), Wait(0.6, 0.5), Wait(3.0, 10.0))
    seen = BatchView((), 1, 0, 0, num_waiting=5, oldest_wait_s=3.0, own_targets=own)
    assert Targets(None, None).weights(seen)[1] == 2
    assert Targets(1.5, None).weights(seen)[1] == pytest.approx(2 + 2 * 0.5)
    assert Targets(1.5, None).weights(replace(seen, num_waiting=3))[1] == 2


def test_slo_needs_no_target_of_the_server_and_such_must_be_positive() -> None:
    assert isinstance(load_policy("slo", context(FREE)), GoodputPolicy)
    with pytest.raises(ConfigError, match="--slo-tpot-ms must be above 0, got 0"):
        EngineConfig(slo_tpot_ms=0.0)


def test_targets_of_the_server_are_refused_where_no_policy_aims_at_them() -> None:
    with pytest.raises(ConfigError, match="--slo-ttft-ms is for --spec-policy slo, the policy is goodput"):
        EngineConfig(slo_ttft_ms=300.0)
    assert EngineConfig(spec_policy="a_module.of_mine", slo_ttft_ms=300.0).slo_ttft_ms == 300.0


def test_a_policy_that_needs_a_cost_model_says_so_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="--spec-profile"):
        load_policy("goodput", PolicyContext())


def test_what_a_drafter_has_to_catch_up_with_is_part_of_its_price() -> None:
    cost = CostModel([1, 1000], [0.010, 0.011], draft=(0, 0, 0, 0, 1e-4))
    for context_len, drafts in ((100, True), (20_000, False)):  # 10 ms and 2 s, over 32 steps
        policy = load_policy("goodput", context(cost))
        sequences = (SequenceView("0", context_len, 100),)
        limits = policy.limits(BatchView(sequences, 1, context_len, 1000, context_len, 1))
        assert (limits[0] > 0) == drafts


def test_whom_to_ask_is_chosen_anew_when_a_tenth_of_the_sequences_are_new_or_after_a_while() -> None:
    policy = load_policy("goodput", context(CostModel([1, 1000], [0.020, 0.021], draft=(0, 1e-5, 0, 0, 0))))

    def asked(first: int) -> int:
        """How many of 40 sequences, of which `first` have left and as many come."""
        sequences = view(40 + first).sequences[first:]
        return sum(map(bool, policy.limits(BatchView(sequences, 40, 2000, 1000, 2000, 40))))

    assert asked(0) == 40
    assert asked(3) == 37, "the three who came wait"
    assert asked(5) == 40
    assert asked(6) == 39
    assert max(asked(6) for _ in range(HOLD)) == 40


# --- Buckets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_sequences", [5, 7, 9, 13])
def test_goodput_fills_a_bucket_for_nothing_and_opens_the_next_only_if_it_pays(num_sequences: int) -> None:
    sizes = (1, 2, 4, 8, 16, 32)
    # Twice the rows take twice the time: without padding nothing would be worth drafting.
    seconds = [1e-3 * rows for rows in sizes]
    cost = CostModel(sizes, seconds, buckets=sizes)
    policy = load_policy("goodput", context(cost))
    assert isinstance(policy, GoodputPolicy)
    steps = live(policy, num_sequences, 0, 200)  # drafts that never come true gain little
    full = next(size for size in sizes if size >= num_sequences)
    # but for a step now and then that verifies to learn
    assert statistics.mode(num_sequences + sum(kept) for kept in steps[100:]) == full

    smooth = load_policy("goodput", context(CostModel(sizes, seconds)))
    assert isinstance(smooth, GoodputPolicy)
    assert statistics.mode(sum(kept) for kept in live(smooth, num_sequences, 0, 200)[100:]) == 0
