"""Drafts from what was said before: the index, the tree that grows from it, and the two methods on top."""

from __future__ import annotations

import random
from collections.abc import Sequence as TokenIds

import pytest

from outpace.config import EngineConfig, SpeculativeConfig
from outpace.errors import ConfigError
from outpace.request import Request, Sequence
from outpace.sampling import SamplingParams
from outpace.spec.proposers.prompt_lookup import PromptLookup
from outpace.spec.proposers.suffix import Suffix
from outpace.spec.suffix_index import KEY_LEN, SuffixIndex
from outpace.tree import DraftTree, grow


def running(token_ids: TokenIds[int], name: str = "0-0", num_prompt: int | None = None) -> Sequence:
    prompt = tuple(token_ids[:num_prompt])
    sequence = Sequence.start(Request(name, prompt, SamplingParams(), seed=0, max_tokens=100))
    sequence.token_ids[:] = token_ids
    return sequence


def suffix(**settings: float) -> Suffix:
    values = {"max_depth": 8, "max_answers": 4, "max_factor": 2.0, "min_prob": 0.1, **settings}
    return Suffix(**values)  # type: ignore[arg-type]


def draft(proposer: PromptLookup | Suffix, sequence: Sequence, limit: int) -> DraftTree:
    (tree,) = proposer.propose([sequence], [limit])
    return tree


def longest_by_hand(text: list[int], max_len: int) -> tuple[int, set[int]]:
    """The definition of a match, tried at every place."""
    found: dict[int, int] = {}
    for place in range(KEY_LEN, len(text)):
        length = 0
        while length < min(max_len, place) and text[place - 1 - length] == text[-1 - length]:
            length += 1
        if length >= KEY_LEN:
            found[place] = length
    best = max(found.values(), default=0)
    return best, {place for place, length in found.items() if length == best}


def test_the_longest_match_is_the_one_found_by_trying_every_place() -> None:
    rng = random.Random(3)
    for _ in range(300):
        text = [rng.randrange(3) for _ in range(rng.randrange(2, 30))]
        index = SuffixIndex()
        index.extend(text)
        length, places = index.matches(text, max_len=6)
        assert (length, set(places)) == longest_by_hand(text, 6), text
        assert places == sorted(places, reverse=True), "most recent first"


def test_no_match_reaches_across_texts() -> None:
    index = SuffixIndex()
    index.extend([1, 2])
    index.end_text()
    index.extend([3, 4, 5])
    index.end_text()
    assert index.matches([2, 3], 5) == (0, [])
    assert index.matches([1, 2], 5) == (0, []), "nothing followed"
    assert index.matches([9, 3, 4], 5)[0] == 2


def test_a_tree_grows_best_first_and_obeys_its_limits() -> None:
    branches = {"": [(1, 0.6), (2, 0.4)], "1": [(3, 0.5), (4, 0.5)], "2": [(5, 1.0)], "25": [(6, 1.0)]}

    def children(place: str) -> list[tuple[int, float, str]]:
        return [(token, prob, f"{place}{token}") for token, prob in branches.get(place, [])]

    tree = grow("", children, max_nodes=10, max_depth=2)
    assert tree.token_ids == (1, 2, 5, 3, 4)
    assert tree.parents == (-1, -1, 1, 0, 0)
    assert tree.confidence == (0.6, 0.4, 1.0, 0.5, 0.5)
    assert grow("", children, max_nodes=3, max_depth=9).token_ids == (1, 2, 5)
    assert grow("", children, max_nodes=9, max_depth=9, min_prob=0.4).token_ids == (1, 2, 5, 6)


def test_prompt_lookup_drafts_what_followed_the_longest_match() -> None:
    tree = draft(PromptLookup(2, 4), running([1, 2, 3, 4, 5, 9, 2, 3, 7, 1, 2, 3]), 3)
    assert tree.token_ids == (4, 5, 9)
    assert tree.is_chain()
    assert tree.confidence == pytest.approx((3 / 5, 4 / 6, 5 / 7)), "surer with every match"


def test_prompt_lookup_branches_where_the_record_does() -> None:
    tree = draft(PromptLookup(2, 2), running([1, 2, 3, 8, 1, 2, 4, 8, 1, 2, 3, 9, 1, 2]), 3)
    assert tree.token_ids[0] == 3
    assert set(zip(tree.parents, tree.token_ids, strict=True)) >= {(-1, 3), (-1, 4)}


def test_prompt_lookup_needs_a_match_of_the_least_length() -> None:
    text = [1, 2, 3, 9, 2, 3]
    assert len(draft(PromptLookup(2, 4), running(text), 2)) == 2
    assert len(draft(PromptLookup(3, 4), running(text), 2)) == 0


def test_prompt_lookup_follows_a_sequence_as_it_grows() -> None:
    proposer, sequence = PromptLookup(2, 4), running([1, 2, 3])
    assert len(draft(proposer, sequence, 4)) == 0
    sequence.token_ids += [1, 2]
    assert draft(proposer, sequence, 1).token_ids == (3,)


def test_suffix_drafts_from_answers_that_ended() -> None:
    proposer = suffix()
    old = running([9, 1, 2, 3, 4, 5], "0-0", num_prompt=1)
    draft(proposer, old, 4)
    proposer.release("0-0")
    assert draft(proposer, running([7, 1, 2], "1-0"), 4).token_ids == (3, 4, 5)


def test_suffix_drafts_no_longer_than_its_match_supports() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    assert len(draft(suffix(max_factor=1.0), running(text), 8)) == 2
    assert len(draft(suffix(max_factor=2.0), running(text), 8)) == 4
    assert len(draft(suffix(max_factor=2.0), running(text), 3)) == 3


def test_suffix_leaves_out_paths_that_are_rare() -> None:
    text = [token for last in (3, 3, 3, 4) for token in (1, 2, last)]
    assert draft(suffix(min_prob=0.3), running([*text, 1, 2]), 2).token_ids[0] == 3
    assert 4 not in draft(suffix(min_prob=0.3), running([*text, 1, 2]), 8).token_ids
    assert 4 in draft(suffix(min_prob=0.1), running([*text, 1, 2]), 8).token_ids


def test_suffix_forgets_the_oldest_answers() -> None:
    proposer = suffix(max_answers=4)
    for number in range(6):
        old = running([99, 2 * number, 2 * number + 1, 50 + number], f"{number}-0", num_prompt=1)
        draft(proposer, old, 1)
        proposer.release(f"{number}-0")

    def remembers(number: int) -> bool:
        tree = draft(proposer, running([2 * number, 2 * number + 1], f"new-{number}"), 1)
        return tree.token_ids == (50 + number,)

    assert not remembers(0)
    assert remembers(4)
    assert remembers(5)


def test_a_limit_of_zero_touches_nothing() -> None:
    proposer = PromptLookup(2, 4)
    assert len(draft(proposer, running([1, 2, 3, 1, 2]), 0)) == 0
    assert not proposer._indexes


def test_flags_and_the_json_object_say_the_same_once() -> None:
    by_flag = EngineConfig(spec_method="ngram", spec_tokens=3)
    by_json = EngineConfig(speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    assert by_flag.speculative == by_json.speculative == SpeculativeConfig("prompt_lookup", 3)
    assert by_flag.policy == "goodput"
    assert EngineConfig("a/model").policy == "off"
    assert EngineConfig(spec_method="suffix", spec_policy="off").policy == "off"
    assert EngineConfig().speculative.verification == "match"
    assert EngineConfig(verification="ratio").speculative.verification == "ratio"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculative_config": {"metod": "suffix"}}, "unknown key 'metod'"),
        ({"spec_method": "suffix", "speculative_config": {"method": "none"}}, "method is given twice"),
        ({"speculative_config": {"num_speculative_tokens": "5"}}, "must be int, got '5'"),
        ({"speculative_config": {"num_speculative_tokens": True}}, "must be int, got True"),
        ({"spec_tokens": 0}, "num_speculative_tokens of --speculative-config must be at least 1"),
        ({"speculative_config": {"prompt_lookup_min": 1}}, r"prompt_lookup_min must be in \[2"),
        ({"speculative_config": {"prompt_lookup_max": 1}}, r"prompt_lookup_min must be in \[2"),
        ({"speculative_config": {"suffix_decoding_max_spec_factor": 0}}, "must be above 0"),
        ({"speculative_config": {"suffix_decoding_min_token_prob": 2.0}}, r"must be in \[0, 1\]"),
        ({"speculative_config": {"verification": "block"}}, "match, ratio or synthetic, got 'block'"),
        ({"verification": "ratio", "speculative_config": {"verification": "match"}}, "given twice"),
    ],
)
def test_settings_of_drafting_that_make_no_sense_are_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)  # type: ignore[arg-type]
