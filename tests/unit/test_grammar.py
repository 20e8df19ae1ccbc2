"""Structured outputs: every answer matches, whatever is drafted, and what cannot be enforced is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from outpace.batch import Batch
from outpace.engine.engine import Engine
from outpace.errors import InvalidRequestError
from outpace.policy.base import BatchView, SpeculationPolicy
from outpace.request import FinishReason, Output, Sequence
from outpace.sampling import SamplingParams, StructuredOutputsParams
from outpace.spec import grammar
from outpace.spec.grammar import CACHE_BYTES, MAX_SCHEMA_DEPTH, Grammars, GrammarStates
from outpace.spec.proposer import Proposer
from outpace.tree import DraftTree
from tiny import EOS, PROMPTS, VOCAB_SIZE, byte_tokenizer, run, submit, text, tiny_engine, tokens

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
}
COMPACT = StructuredOutputsParams(json=PERSON, disable_any_whitespace=True)
GREEDY = SamplingParams(temperature=0, max_tokens=80, structured_outputs=COMPACT)
SAMPLED = replace(
    GREEDY, temperature=0.9, top_p=0.95, seed=5, presence_penalty=0.5, logit_bias={34: 1.0}, logprobs=2
)


def grammars() -> Grammars:
    return Grammars(byte_tokenizer(), VOCAB_SIZE, [EOS])


def constrained(**asked: Any) -> SamplingParams:
    """Sampled almost at random, and enough room to come to an end."""
    return SamplingParams(seed=3, max_tokens=120, structured_outputs=StructuredOutputsParams(**asked))


def answer(sampling: SamplingParams, **settings: Any) -> list[Output]:
    engine = tiny_engine(**settings)
    submit(engine, "r", "Once upon a time", sampling)
    outputs = run(engine)["r-0"]
    assert not engine.grammars._cursors, "a finished answer is forgotten"
    return outputs


# --- Answers match --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_matches_its_schema_and_ends_where_it_is_complete(seed: int) -> None:
    outputs = answer(replace(SAMPLED, seed=seed))
    person = json.loads(text(outputs))
    assert list(person) == ["name", "age", "tags"]
    assert len(person["name"]) <= 6
    assert 0 <= person["age"] <= 99
    assert set(person["tags"]) <= {"red", "green"}
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert tokens(outputs)[-1] == EOS


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": r"[0-9]{3}-[a-f]{2,4}"}, r"[0-9]{3}-[a-f]{2,4}"),
        ({"choice": ("yes", "no", 'say "né\\\n😀"')}, r'yes|no|say "né\\\n😀"'),
        ({"grammar": 'root ::= "(" [a-c]{1,4} (", " root)? ")"'}, r"\([a-c]{1,4}.*\)+"),
        ({"json": '{"type": "integer", "minimum": 10, "maximum": 19}'}, r"1[0-9]"),
        ({"json": {"type": "string", "format": "date"}}, r'"\d{4}-\d\d-\d\d"'),
        (
            {"structural_tag": {"type": "structural_tag", "format": {"type": "const_string", "value": "hm"}}},
            "hm",
        ),
    ],
)
def test_every_kind_of_constraint_is_kept(asked: dict[str, Any], pattern: str) -> None:
    outputs = answer(constrained(**asked))
    assert re.fullmatch(pattern, text(outputs))
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_any_json_object_may_have_any_names() -> None:
    sampling = constrained(json_object=True)
    # A bias towards braces, quotes and colons: random tokens would rather go on with a string for ever.
    outputs = answer(replace(sampling, temperature=0, logit_bias={125: 50.0, 34: 40.0, 58: 30.0, 49: 20.0}))
    assert isinstance(json.loads(text(outputs)), dict)


def test_special_tokens_are_never_chosen_for_their_text() -> None:
    outputs = answer(replace(constrained(regex="[^x]{4}"), logit_bias={257: 100.0, 258: 100.0}))
    assert len(text(outputs)) == 4


def test_a_plain_request_beside_it_is_not_constrained() -> None:
    plain = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    engine = tiny_engine()
    submit(engine, "plain", PROMPTS[0], plain)
    alone = tokens(run(engine)["plain-0"])
    submit(engine, "r", PROMPTS[1], SAMPLED)
    submit(engine, "plain", PROMPTS[0], plain)
    assert tokens(run(engine)["plain-0"]) == alone


# --- And do not depend on drafts -------------------------------------------------------------------------


class Branches(Proposer):
    """Drafts what a past run answered, with branches: some that the grammar forbids, some that it allows."""

    def __init__(self, known: dict[str, list[int]]) -> None:
        self.known = known

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        trees = []
        for sequence, limit in zip(sequences, limits, strict=True):
            right = [*self.known[sequence.id][sequence.num_output :], EOS, EOS, EOS][:3]
            wrong = [ord(char) for char in "}a\x00"]
            kind = sequence.num_output % 3
            confidence = (0.6, 0.5, 0.3, 0.9, 0.8, 0.5, 0.4) if kind else None
            token_ids = (wrong[0], right[0], wrong[1], right[1], right[1], right[2], wrong[2])
            tree = DraftTree((-1, -1, 0, 0, 1, 4, 4), token_ids, confidence)
            trees.append(DraftTree() if kind == 1 else tree.cut(limit))
        return trees


class Counted(SpeculationPolicy):
    """Allows the same to everyone, cuts now and then, and counts."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.num_accepted = self.num_steps = 0

    def limits(self, view: BatchView) -> list[int]:
        return [self.most] * len(view.sequences)

    def trim(self, view: BatchView, confidences: Any) -> list[int] | None:
        return None if view.num_rows % 3 else [2] * len(confidences)

    def observe(self, record: Any) -> None:
        self.num_steps += 1
        self.num_accepted += sum(record.num_accepted)


def full_answers(engine: Engine, sampling: SamplingParams) -> dict[str, list[Output]]:
    for number, prompt in enumerate(PROMPTS):
        submit(engine, str(number), prompt, replace(sampling, n=1 + number % 2))
    return run(engine)


@pytest.fixture(scope="module", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def expected(request: pytest.FixtureRequest) -> tuple[SamplingParams, dict[str, list[Output]]]:
    return request.param, full_answers(tiny_engine(), request.param)


def joined(outputs: dict[str, list[Output]]) -> dict[str, Any]:
    return {
        request_id: (
            text(parts),
            tokens(parts),
            [(at.token_id, at.rank) for part in parts for at in part.logprobs or ()],
            parts[-1].finish_reason,
        )
        for request_id, parts in outputs.items()
    }


@pytest.mark.parametrize("num_blocks", [None, 20])
@pytest.mark.parametrize("most", [1, 4, 9])
def test_drafts_and_preemption_do_not_change_an_answer(
    expected: Any, most: int, num_blocks: int | None
) -> None:
    sampling, plain = expected
    engine = tiny_engine(num_blocks=num_blocks, enable_prefix_caching=num_blocks is None)
    engine.proposer = Branches({name: tokens(parts) for name, parts in plain.items()})
    policy = engine.policy = Counted(most)
    assert joined(full_answers(engine, sampling)) == joined(plain)
    assert policy.num_accepted > 100
    if num_blocks:
        assert engine.scheduler.num_preemptions > 0


def test_what_the_grammar_forces_is_drafted_without_a_draft_method(expected: Any) -> None:
    sampling, plain = expected
    engine = tiny_engine(spec_policy="fixed", spec_tokens=8)
    counted = engine.policy = Counted(8)
    assert joined(full_answers(engine, sampling)) == joined(plain)
    num_tokens = sum(len(tokens(parts)) for parts in plain.values())
    assert counted.num_accepted > num_tokens / 3


def test_a_stop_string_ends_a_constrained_answer_too(expected: Any) -> None:
    sampling, _ = expected
    sampling = replace(sampling, stop=('"age',), n=1)
    plain = answer(sampling)
    assert text(plain).startswith('{"name": "')
    assert plain[-1].stop_reason == '"age'
    assert text(answer(sampling, spec_policy="fixed", spec_tokens=7)) == text(plain)


# --- What is drafted -------------------------------------------------------------------------------------


def started(asked: StructuredOutputsParams, answer: str = "") -> Sequence:
    engine = tiny_engine()
    sampling = SamplingParams(structured_outputs=asked)
    sequence = Sequence.start(engine.admission.requests("r", [1, 2], sampling)[0])
    sequence.token_ids.extend(answer.encode())
    return sequence


def fitted(sequence: Sequence, limit: int, tree: DraftTree) -> DraftTree:
    states = GrammarStates(byte_tokenizer(), VOCAB_SIZE)
    (fitted,) = states.fit([sequence], [limit], [tree])
    return fitted


def chain(drafted: str, confidence: float | None = None) -> DraftTree:
    probs = None if confidence is None else (confidence,) * len(drafted)
    return DraftTree.chain(tuple(drafted.encode()), probs)


def test_forced_text_is_drafted_up_to_the_limit() -> None:
    assert fitted(started(COMPACT), 5, DraftTree()) == chain('{"nam', 1.0)


def test_a_limit_of_zero_drafts_nothing() -> None:
    assert fitted(started(COMPACT), 0, DraftTree()) == DraftTree()


def test_forbidden_nodes_go_with_all_that_follows_them() -> None:
    #     root
    #   0:{   1:x        x is forbidden, so is its child; of the children of { only the quote is not
    #  2:" 3:n 4:{
    tree = DraftTree((-1, -1, 0, 0, 1), tuple(b'{x"n{'), (0.5, 0.9, 0.5, 0.5, 0.5))
    kept = fitted(started(COMPACT), 3, tree)
    assert kept == DraftTree((-1, 0, 1), tuple(b'{"n'), (0.5, 0.5, 1.0))


def test_a_draft_goes_on_with_what_it_forces() -> None:
    sequence = started(COMPACT, '{"name": "')
    assert fitted(sequence, 8, chain('Bo"')) == chain('Bo", "ag')
    assert fitted(sequence, 8, chain('Bo"', 0.5)).confidence == (0.5, 0.5, 0.5, 1, 1, 1, 1, 1)


def test_forced_nodes_take_the_place_of_less_probable_ones() -> None:
    choice = StructuredOutputsParams(choice=("apple", "banana"))
    tree = DraftTree((-1, -1), tuple(b"ab"), (0.7, 0.3))
    assert fitted(started(choice), 5, tree) == DraftTree(
        (-1, 0, 1, 2, 3), tuple(b"apple"), (0.7, 1.0, 1.0, 1.0, 1.0)
    )


def test_a_grammar_that_forces_text_for_ever_or_nearly_so_is_drafted_up_to_the_limit() -> None:
    endless = StructuredOutputsParams(grammar='root ::= "ab" x\nx ::= "c" x')
    assert fitted(started(endless), 6, DraftTree()) == chain("abcccc", 1.0)
    assert fitted(started(StructuredOutputsParams(regex="a{1000000000}")), 3, DraftTree()) == chain(
        "aaa", 1.0
    )


def test_the_end_is_drafted_where_it_is_all_that_is_left() -> None:
    only = StructuredOutputsParams(choice=("yes",))
    assert fitted(started(only, "ye"), 5, DraftTree()).token_ids == (ord("s"), EOS)
    assert fitted(started(only, "ye"), 1, DraftTree()).token_ids == (ord("s"),)
    open_ended = StructuredOutputsParams(choice=("yes", "yesterday"))
    assert fitted(started(open_ended, "ye"), 5, DraftTree()) == chain("s", 1.0)


def test_nothing_is_done_for_sequences_without_a_grammar() -> None:
    states = GrammarStates(byte_tokenizer(), VOCAB_SIZE)
    plain = Sequence.start(tiny_engine().admission.requests("r", [1, 2], SamplingParams())[0])
    tree = chain("anything")
    assert states.fit([plain], [8], [tree])[0] is tree
    batch: Any = type("Batch", (), {"entries": ()})
    assert states.allowed(batch) is None


# --- Constraints against each other ----------------------------------------------------------------------


def test_tokens_that_the_grammar_excludes_may_be_the_only_ones_allowed() -> None:
    digits = tuple(b"0123456789")
    outputs = answer(replace(constrained(regex="a[0-9]{2}"), allowed_token_ids=digits))
    assert re.fullmatch("a[0-9]{2}", text(outputs))
    narrow = answer(replace(constrained(regex="[a-z0-9]{6}"), allowed_token_ids=tuple(b"7")))
    assert text(narrow) == "777777"


def test_bad_words_give_way_where_the_grammar_leaves_nothing_else() -> None:
    assert text(answer(replace(constrained(regex="ab[bc]{3}"), bad_words=("b",)))) == "abccc"


def test_the_minimum_length_gives_way_where_the_answer_is_complete() -> None:
    outputs = answer(replace(constrained(regex="[ab]{2,4}"), min_tokens=20))
    assert re.fullmatch("[ab]{4}", text(outputs))
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert len(tokens(outputs)) == 5


@pytest.mark.parametrize("spec", [{}, {"spec_policy": "fixed"}], ids=["plain", "drafted"])
def test_a_grammar_that_leads_nowhere_is_an_error(spec: dict[str, Any]) -> None:
    outputs = answer(constrained(grammar='root ::= "ab" x\nx ::= "c" x'), **spec)
    assert outputs[-1].finish_reason is FinishReason.LENGTH  # it can go on for ever
    outputs = answer(constrained(grammar='root ::= "ab" x\nx ::= x'), **spec)
    assert (text(outputs), outputs[-1].finish_reason) == ("ab", FinishReason.ERROR)
    assert "allows no token here" in str(outputs[-1].stop_reason)


def test_a_grammar_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_STEP_S", -1.0)
    outputs = answer(GREEDY)
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert "too many ways" in str(outputs[-1].stop_reason)
    assert len(tokens(outputs)) == 1
    assert answer(SamplingParams(max_tokens=3))[-1].finish_reason is FinishReason.LENGTH


def test_every_row_of_a_mask_allows_something() -> None:
    engine = tiny_engine(spec_policy="fixed", spec_tokens=8)
    seen: list[torch.Tensor] = []
    inner = engine.grammars.allowed

    def allowed(batch: Batch) -> torch.Tensor | None:
        mask = inner(batch)
        assert mask is not None
        assert mask.shape == (len(batch.sample_rows), VOCAB_SIZE)
        seen.append(mask)
        return mask

    engine.grammars.allowed = allowed  # type: ignore[method-assign]
    submit(engine, "r", "x", GREEDY)
    run(engine)
    assert all(mask.any(dim=1).all() for mask in seen)
    assert any(len(mask) > 1 for mask in seen)


# --- What is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"regex": "(a"}, "the regular expression cannot be used: Regex parsing error at position 3"),
        ({"regex": "(?=a)b"}, "Lookahead is not supported"),
        ({"regex": "\ud800"}, "surrogates not allowed"),
        ({"grammar": "start ::= x"}, 'The root rule with name "root" is not found'),
        ({"grammar": 'root ::= y "a"'}, 'Rule "y" is not defined'),
        ({"json": '{"type":'}, "the JSON schema cannot be used: Expecting value"),
        ({"json": {"type": "whole"}}, 'Unsupported type "whole"'),
        ({"json": {"$ref": "#/nope"}}, "Cannot find field nope"),
        ({"json": {"enum": []}}, "enum array must not be empty"),
        (
            {"json": {"type": "array", "uniqueItems": True}},
            "JSON schema cannot be used: 'uniqueItems' is not",
        ),
        ({"json": {"properties": {"a": {"not": {}}}}}, "'not' is not supported"),
        ({"json": {"anyOf": [{}], "type": "string"}}, "'type' beside 'anyOf' is not supported"),
        ({"json": {"allOf": [{}, {}]}}, "'allOf' is supported with one schema only"),
        ({"json": {"minimum": 3}}, "'minimum' needs a 'type'"),
        ({"json": {"type": "number", "multipleOf": 0.5}}, "'multipleOf' is supported for the type 'integer'"),
        ({"json": {"type": "string", "pattern": "a", "maxLength": 3}}, "'maxLength' beside 'pattern'"),
        ({"json": {"type": "string", "pattern": 'a"'}}, "a 'pattern' of characters that JSON escapes"),
        ({"json": {"type": "string", "maxLength": "3"}}, "must be an integer of at least 0, got '3'"),
        ({"json": {"type": "string", "minLength": 3, "maxLength": 2}}, "cannot be used"),
        ({"json": {"required": ["a"], "properties": 5}}, "cannot be used"),
        ({"json": {"required": 3}}, "'required' must be a list, got 3"),
        ({"json": {"type": "integer", "default": {1}}}, "not JSON serializable"),
        ({"structural_tag": "{}"}, "Structural tag must have a format field"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_reason(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        grammars().compile(StructuredOutputsParams(**asked))
    assert reason in str(caught.value)
    assert caught.value.param == "structured_outputs"
    assert "cpp" not in str(caught.value)


def test_a_schema_nested_too_deeply_is_refused_before_it_is_compiled() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(MAX_SCHEMA_DEPTH):
        schema = {"type": "array", "items": schema}
    grammars().compile(StructuredOutputsParams(json=schema))
    with pytest.raises(InvalidRequestError, match=f"deeper than {MAX_SCHEMA_DEPTH}"):
        grammars().compile(StructuredOutputsParams(json={"type": "array", "items": schema}))


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, "needs exactly one of json, regex, choice, grammar, json_object, structural_tag: got none"),
        ({"regex": "a", "choice": ("b",)}, "got regex and choice"),
        ({"json_object": False}, "got none"),
        ({"choice": ()}, "choice must be a non-empty list"),
        ({"regex": "a", "disable_any_whitespace": True}, "goes with json, not with regex"),
    ],
)
def test_exactly_one_constraint_is_given(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        StructuredOutputsParams(**asked)


def test_an_answer_that_must_not_end_cannot_be_constrained() -> None:
    with pytest.raises(InvalidRequestError, match="ignore_eos must be false with structured outputs"):
        SamplingParams(ignore_eos=True, structured_outputs=COMPACT)


def test_a_model_without_an_end_cannot_be_constrained() -> None:
    with pytest.raises(InvalidRequestError, match="this one names none"):
        Grammars(byte_tokenizer(), VOCAB_SIZE, []).compile(COMPACT)


def test_compiled_grammars_are_kept_and_their_memory_is_bounded() -> None:
    compiling = grammars()
    compiling.compile(COMPACT)
    assert compiling._compiler is not None
    size = compiling._compiler.get_cache_size_bytes()
    compiling.compile(COMPACT)
    assert compiling._compiler.get_cache_size_bytes() == size > 0
    assert compiling._compiler.cache_limit_bytes == CACHE_BYTES


def test_required_names_are_required_even_where_properties_do_not_list_them() -> None:
    schema = {"type": "object", "required": ["a"]}
    assert text(answer(constrained(json=schema, disable_any_whitespace=True))).startswith('{"a": ')


def test_strings_of_bounded_length_hold_no_control_characters() -> None:
    sampling = constrained(json={"type": "string", "minLength": 2, "maxLength": 5})
    outputs = answer(replace(sampling, logit_bias=dict.fromkeys(range(32), 100.0)))
    assert 2 <= len(json.loads(text(outputs))) <= 5


def test_a_padded_vocabulary_is_masked_to_its_end() -> None:
    padded = Grammars(byte_tokenizer(), VOCAB_SIZE + 61, [EOS])
    request = tiny_engine().admission.requests("r", [1, 2], GREEDY)[0]
    sequence = Sequence.start(replace(request, grammar=padded.compile(COMPACT)))
    states = GrammarStates(byte_tokenizer(), VOCAB_SIZE + 61)
    (tree,) = states.fit([sequence], [20], [DraftTree()])
    entry = type("Entry", (), {"sequence": sequence, "tree": tree, "first_sample": 0})
    batch: Any = type("Batch", (), {"entries": (entry,), "sample_rows": torch.zeros(1 + len(tree))})
    mask = states.allowed(batch)
    assert mask is not None
    assert mask.shape == (1 + len(tree), VOCAB_SIZE + 61)
    assert not mask[:, VOCAB_SIZE:].any()
