"""What every speculation policy must keep. The files in policy/ are found by themselves."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest

from outpace.config import SpeculativeConfig
from outpace.policy import base as policies
from outpace.policy.base import BatchView, SequenceView, SpeculationPolicy, StepRecord, load_policy
from outpace.sampling import SamplingParams
from tiny import GREEDY, SAMPLED, Guesser, answers, tiny_engine

POLICIES = policies.available()
PHASES = ("plan", "propose", "forward", "verify")


def random_view(rng: random.Random) -> BatchView:
    """A step of up to 64 sequences, of which some have no use for a draft."""
    sequences = tuple(
        SequenceView(f"{i}-0", rng.randrange(4000), rng.choice([0, 1, rng.randrange(200)]))
        for i in range(rng.choice([0, 1, 2, 8, 64]))
    )
    num_context = sum(sequence.context_len for sequence in sequences)
    num_rows = len(sequences) + rng.choice([0, 1, 512])
    return BatchView(sequences, max(num_rows, 1), num_context, rng.choice([0, 5, 10_000]))


def random_record(rng: random.Random, view: BatchView, drafted: list[int]) -> StepRecord:
    """What may have become of the drafts."""
    seconds = {phase: rng.uniform(1e-4, 2e-2) for phase in PHASES}
    accepted = tuple(rng.randint(0, num) for num in drafted)
    return StepRecord(
        seconds={**seconds, "total": sum(seconds.values())},
        num_rows=view.num_rows + sum(drafted),
        num_context=view.num_context,
        num_tokens=len(drafted) + sum(accepted),
        num_drafted=tuple(drafted),
        num_accepted=accepted,
    )


def drive(policy: SpeculationPolicy, seed: int, num_steps: int = 60) -> list[Any]:
    """Takes a policy through random steps, checks each of its answers and gives all of them."""
    rng = random.Random(seed)
    said: list[Any] = []
    for _ in range(num_steps):
        view = random_view(rng)
        limits = policy.limits(view)
        assert len(limits) == len(view.sequences)
        assert all(0 <= k <= s.max_draft for k, s in zip(limits, view.sequences, strict=True))
        drafted = [rng.randint(0, limit) for limit in limits]
        confidences = [[rng.random() for _ in range(num)] if rng.random() < 0.8 else None for num in drafted]
        kept = policy.trim(view, confidences)
        if kept is not None:
            assert len(kept) == len(drafted)
            assert all(num >= 0 for num in kept)
            drafted = [min(num, cut) for num, cut in zip(drafted, kept, strict=True)]
        policy.observe(random_record(rng, view, drafted))
        said += [limits, kept]
    return said


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_each_sequence_gets_a_limit_that_is_of_use_to_it(name: str, seed: int) -> None:
    drive(load_policy(name, SpeculativeConfig()), seed)


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_steps_get_the_same_answers(name: str) -> None:
    assert drive(load_policy(name, SpeculativeConfig()), 7) == drive(
        load_policy(name, SpeculativeConfig()), 7
    )


@pytest.mark.parametrize("name", POLICIES)
def test_no_torch_is_needed(name: str) -> None:
    code = (
        "import sys; from outpace.config import SpeculativeConfig\n"
        "from outpace.policy.base import load_policy\n"
        f"load_policy({name!r}, SpeculativeConfig())"
    )
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_those_without_speculation(name: str, sampling: SamplingParams) -> None:
    plain = answers(tiny_engine(), sampling)
    engine = tiny_engine(spec_policy=name)
    engine.proposer = Guesser({f"{number}-0": known for number, known in enumerate(plain)})
    assert answers(engine, sampling) == plain


class Careless(SpeculationPolicy):
    """Allows the same whatever is of use."""

    def limits(self, view: BatchView) -> list[int]:
        return [3] * len(view.sequences)


def test_these_checks_notice_what_they_look_for() -> None:
    with pytest.raises(AssertionError):
        drive(Careless(), 0)
