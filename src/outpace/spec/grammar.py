"""Structured outputs: what an answer may still say, at each node of a draft.

`Grammars` compiles at admission; `GrammarStates` follows answers in the engine. A state is a function of the
answer's tokens, brought up to date when it is needed: nothing to undo after a preemption or a rejected draft.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from outpace.batch import Batch
from outpace.errors import InvalidRequestError
from outpace.request import FinishReason, Output
from outpace.request import Sequence as Running
from outpace.sampling import StructuredOutputsParams
from outpace.tree import EMPTY_TREE, DraftTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from xgrammar import CompiledGrammar, GrammarCompiler, GrammarMatcher, TokenizerInfo

CACHE_BYTES = 2**28  # of compiled grammars, least recently used first out
MAX_SCHEMA_DEPTH = 64  # the compiler's time grows with its square and worse
# CPU time of one answer in one step before it is given up: grammars that can be read in very many ways take
# longer with every token, and everyone waits for them.
MAX_STEP_S = 0.5
_DEAD_END = "the grammar allows no token here: the answer cannot be completed"
_TOO_SLOW = "the grammar can be read in too many ways to be followed any further: make it less ambiguous"
_WORD_BITS = 32  # of xgrammar's masks

_NAMES = {
    "json": "JSON schema",
    "regex": "regular expression",
    "choice": "choice",
    "grammar": "grammar",
    "json_object": "JSON object",
    "structural_tag": "structural tag",
}
# Keywords of JSON schema that the compiler would pass over in silence: always, beside one of those that
# combine schemas, and without a type.
_NOT_ENFORCED = frozenset(
    {"contains", "dependencies", "dependentRequired", "dependentSchemas", "else", "if", "maxContains"}
    | {"minContains", "not", "then", "uniqueItems"}
)
_COMBINING = ("$ref", "anyOf", "oneOf", "allOf")
_BOUNDS = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength"}
    | {"pattern", "format", "minItems", "maxItems", "minProperties", "maxProperties"}
)
_ASSERTIONS = _BOUNDS | {"type", "const", "enum", "properties", "required", "items", "prefixItems"}
_ESCAPED = re.compile(r'"|\\[\\nrtfvxu0]')  # in a regular expression
_SUBSCHEMA = ("items", "additionalProperties", "propertyNames", "unevaluatedItems", "unevaluatedProperties")
_SUBSCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SUBSCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")


@final
class Grammars:
    """Compiles what requests ask of their answers' form. Safe in several threads at a time."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        """Notes whose tokens they are; the compiler is built for the first request that needs it.

        Args:
            tokenizer: The model's.
            vocab_size: Columns of its logits; more than the tokenizer has, where they are padded.
            eos_token_ids: What ends an answer.
        """
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, eos_token_ids
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()

    def compile(self, asked: StructuredOutputsParams) -> CompiledGrammar:
        """The grammar of an answer; one that was compiled lately is at hand.

        Raises:
            InvalidRequestError: It is malformed, or asks for what cannot be enforced.
        """
        if not self._eos_token_ids:
            raise InvalidRequestError(
                "structured outputs need a model with an end-of-sequence token: this one names none",
                "structured_outputs",
            )
        with self._lock:
            if self._compiler is None:
                self._compiler = self._load()
        (kind,) = asked.given
        try:
            return _compile(self._compiler, asked)
        except (RuntimeError, ValueError, TypeError) as error:  # the compiler has no type of its own
            raise InvalidRequestError(
                f"the {_NAMES[kind]} cannot be used: {_reason(error)}", "structured_outputs"
            ) from error

    def _load(self) -> GrammarCompiler:
        from xgrammar import GrammarCompiler

        # One thread: those of the engine's kernels wait for each other, and would for this one's.
        info = _tokenizer_info(self._tokenizer, self._vocab_size, self._eos_token_ids)
        return GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES)


@final
class GrammarStates:
    """Where each constrained answer stands in its grammar, and what the grammar allows from there.

    Touched only where some sequence has a grammar.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
        """Starts with no answer.

        Args:
            tokenizer: Writes what a grammar forces as tokens.
            vocab_size: Columns of the logits.
        """
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._cursors: dict[str, _Cursor] = {}
        self._vocabulary: _Vocabulary | None = None  # made for the first draft

    def fit(
        self, sequences: Sequence[Running], limits: Sequence[int], trees: list[DraftTree]
    ) -> list[DraftTree]:
        """Cuts from drafts what grammars forbid, and adds what they force.

        Args:
            sequences: Those that will sample.
            limits: Most nodes allowed for each; with 0 nothing is done.
            trees: Their drafts, whoever made them.

        Returns:
            Their trees, in which each node is allowed after its ancestors.
        """
        return [
            tree if s.request.grammar is None else self._fit(s, limit, tree) if limit else EMPTY_TREE
            for s, limit, tree in zip(sequences, limits, trees, strict=True)
        ]

    def allowed(self, batch: Batch) -> torch.Tensor | None:
        """What may be chosen at each sampled row.

        Returns:
            [samples, vocab] bool; None if no sequence of the batch has a grammar. Some token is allowed in
            every row: where a grammar leads nowhere, the one that ends the answer.
        """
        constrained = [
            (entry, entry.first_sample)
            for entry in batch.entries
            if entry.sequence.request.grammar is not None and entry.first_sample is not None
        ]
        if not constrained:
            return None
        bits = _new_bits(len(batch.sample_rows), self._vocab_size)
        for entry, first_sample in constrained:
            cursor = self._cursor(entry.sequence)
            with cursor.timed():
                for row, path in enumerate(((), *entry.tree.paths()), first_sample):
                    cursor.fill(path, bits, row)
        return torch.from_numpy(_unpacked(bits, self._vocab_size)).view(torch.bool)

    def judge(self, outputs: list[Output]) -> list[Output]:
        """The same outputs; one that ended where its grammar does not is an error, with the reason."""
        if not self._cursors:
            return outputs
        return [self._judged(output) if output.request_id in self._cursors else output for output in outputs]

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence that ended."""
        self._cursors.pop(sequence_id, None)

    def _cursor(self, sequence: Running) -> _Cursor:
        """The sequence's, after its known tokens."""
        cursor = self._cursors.get(sequence.id)
        if cursor is None:
            assert sequence.request.grammar is not None
            cursor = self._cursors[sequence.id] = _Cursor(sequence.request.grammar)
        with cursor.timed():
            cursor.know(sequence.token_ids[sequence.num_prompt + cursor.num_known :])
        return cursor

    def _fit(self, sequence: Running, limit: int, tree: DraftTree) -> DraftTree:
        cursor = self._cursor(sequence)
        if cursor.is_given_up:
            return EMPTY_TREE
        if self._vocabulary is None:
            self._vocabulary = _Vocabulary(cursor.texts)
        # As picked, even if its tokens were drawn: which of them are cut depends on what was drawn.
        tree = DraftTree(tree.parents, tree.token_ids, tree.confidence)
        with cursor.timed():
            tree = tree.keep([node for node, path in enumerate(tree.paths()) if cursor.go(path)])
            return self._extended(cursor, self._vocabulary, limit, tree)

    def _extended(self, cursor: _Cursor, vocabulary: _Vocabulary, limit: int, tree: DraftTree) -> DraftTree:
        """A tree whose leaves go on with what the grammar forces there."""
        paths, inner = tree.paths(), set(tree.parents)
        parents, token_ids = [*tree.parents], [*tree.token_ids]
        for leaf in (node for node in range(-1, len(tree)) if node not in inner):
            parent = leaf
            for token_id in self._forced(cursor, vocabulary, paths[leaf] if leaf >= 0 else (), limit):
                parents.append(parent)
                token_ids.append(token_id)
                parent = len(token_ids) - 1
        num_forced = len(token_ids) - len(tree)
        if not num_forced:
            return tree
        given = tree.confidence if len(tree) else ()
        # What is forced is as probable as what it follows.
        confidence = None if given is None else (*given, *[1.0] * num_forced)
        return DraftTree(tuple(parents), tuple(token_ids), confidence).best_first().cut(limit)

    def _forced(
        self, cursor: _Cursor, vocabulary: _Vocabulary, path: tuple[int, ...], limit: int
    ) -> list[int]:
        """The tokens that must follow a path, at most `limit`, as the tokenizer would write them."""
        text, end = cursor.forced(path, vocabulary, limit)
        written = text.decode(errors="ignore")
        forced: list[int] = []
        for token_id in [*self._tokenizer.encode(written, add_special_tokens=False), *end][:limit]:
            if not cursor.go((*path, *forced, token_id)):
                break
            forced.append(token_id)
        return forced

    def _judged(self, output: Output) -> Output:
        ends_by_itself = output.finish_reason is FinishReason.STOP and output.stop_reason is None
        cursor = self._cursors[output.request_id]
        if not ends_by_itself or (not cursor.is_given_up and cursor.go(output.token_ids)):
            return output
        reason = _TOO_SLOW if cursor.is_given_up else _DEAD_END
        return replace(output, finish_reason=FinishReason.ERROR, stop_reason=reason)


@final
class _Vocabulary:
    """The bytes of each token, and what several of them have in common."""

    def __init__(self, texts: list[bytes]) -> None:
        self._texts = texts
        self._order = sorted(range(len(texts)), key=texts.__getitem__)
        self._ranks = np.empty(len(texts), np.int64)
        self._ranks[self._order] = np.arange(len(texts))

    def __len__(self) -> int:
        return len(self._texts)

    def common(self, token_ids: np.ndarray) -> bytes:
        """What must follow where one of these tokens must: the longest, if all others begin it."""
        ranks = self._ranks[token_ids]
        ends: list[bytes] = [self._texts[self._order[rank]] for rank in (ranks.min(), ranks.max())]
        first, last = ends
        is_chain = len(ranks) <= len(last) and all(last.startswith(self._texts[i]) for i in token_ids)
        if is_chain:
            return last
        pairs = enumerate(zip(first, last, strict=False))  # the shorter one first, if it begins the other
        return first[: next((at for at, (a, b) in pairs if a != b), len(first))]


@final
class _Cursor:
    """A matcher that stands after an answer's known tokens, and walks along drafted ones and back."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        from xgrammar import GrammarMatcher

        self._grammar = grammar
        self._matcher: GrammarMatcher = GrammarMatcher(grammar)
        self._path: list[int] = []  # drafted tokens it has taken
        self.num_known = 0
        self.is_given_up = False

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Gives the answer up if what is done inside takes too long; then it may only end."""
        begin = time.thread_time()  # not the wall's: a machine that stands still is no fault of the grammar
        yield
        self.is_given_up |= time.thread_time() - begin > MAX_STEP_S

    def know(self, token_ids: list[int]) -> None:
        """Takes further known tokens, from the beginning of the drafts."""
        self.go(())
        for token_id in token_ids if not self.is_given_up else ():
            taken = self._matcher.accept_token(token_id)
            assert taken, "only tokens that the grammar allows are ever chosen"
        self.num_known += len(token_ids)

    def go(self, path: Sequence[int]) -> bool:
        """Walks to the end of a drafted path; False if the grammar forbids it, and then as far as it may."""
        common = 0
        while common < min(len(path), len(self._path)) and path[common] == self._path[common]:
            common += 1
        if common < len(self._path):
            self._matcher.rollback(len(self._path) - common)
            del self._path[common:]
        for token_id in path[common:]:
            if self._matcher.is_terminated() or not self._matcher.accept_token(token_id):
                return False
            self._path.append(token_id)
        return True

    @property
    def texts(self) -> list[bytes]:
        """The bytes of each token of the vocabulary."""
        texts: list[bytes] = self._grammar.tokenizer_info.decoded_vocab
        return texts

    def forced(self, path: Sequence[int], vocabulary: _Vocabulary, limit: int) -> tuple[bytes, list[int]]:
        """What must follow a path that is allowed: bytes, and the token that then ends the answer if it must.

        The matcher's own search for it has no limit, and there are grammars that force text for ever.

        Args:
            path: Drafted tokens.
            vocabulary: Whose tokens they are.
            limit: About how many tokens are of use.
        """
        self.go(path)
        text, end, num_pieces = b"", [], 0
        bits = _new_bits(1, len(vocabulary))
        while num_pieces < limit and not self._matcher.is_terminated():
            self._matcher.fill_next_token_bitmask(bits)
            choices = np.flatnonzero(_unpacked(bits, len(vocabulary)))
            if may_end := set(self._matcher.stop_token_ids).intersection(choices.tolist()):
                end = [*may_end] if len(choices) == 1 else []
                break
            piece = vocabulary.common(choices) if len(choices) else b""
            if not piece:
                break
            self._matcher.accept_string(piece)
            text += piece
            num_pieces += 1
        if num_pieces:
            self._matcher.rollback(num_pieces)
        return text, end

    def fill(self, path: Sequence[int], bits: torch.Tensor, row: int) -> None:
        """Writes what may follow a path that is allowed into a row of a mask that allows everything."""
        self.go(path)
        if self._matcher.is_terminated():
            return  # after the end anything: it is never looked at
        if self.is_given_up:
            bits[row] = 0
        else:
            self._matcher.fill_next_token_bitmask(bits, row)
        if not bits[row].any():
            words = bits[row].numpy().view(np.uint32)
            for token_id in self._matcher.stop_token_ids:
                words[token_id // _WORD_BITS] |= np.uint32(1 << token_id % _WORD_BITS)


def _new_bits(num_rows: int, vocab_size: int) -> torch.Tensor:
    """Masks that allow everything: [rows, words] int32."""
    return torch.full((num_rows, -(-vocab_size // _WORD_BITS)), -1, dtype=torch.int32)


def _unpacked(bits: torch.Tensor, vocab_size: int) -> np.ndarray:
    """Masks of [rows, words] int32 as [rows, vocab] of 0 and 1."""
    return np.unpackbits(bits.numpy().view(np.uint8), axis=1, count=vocab_size, bitorder="little")


def _tokenizer_info(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Collection[int]
) -> TokenizerInfo:
    """The vocabulary as xgrammar wants it, without text for special tokens, which answers do not show."""
    from xgrammar import TokenizerInfo

    stop = sorted(eos_token_ids)
    found = TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=stop)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    texts = [""] * vocab_size
    for text, token_id in tokenizer.get_vocab().items():
        if token_id < vocab_size and not (token_id in added and added[token_id].special):
            texts[token_id] = text
    return TokenizerInfo(
        texts,
        vocab_type=found.vocab_type,
        vocab_size=vocab_size,
        stop_token_ids=stop,
        add_prefix_space=found.add_prefix_space,
    )


def _compile(compiler: GrammarCompiler, asked: StructuredOutputsParams) -> CompiledGrammar:
    """Compiles whichever constraint is given."""
    if asked.json is not None:
        schema = json.loads(asked.json) if isinstance(asked.json, str) else asked.json
        text = json.dumps(enforceable(schema), ensure_ascii=False)
        return compiler.compile_json_schema(text, any_whitespace=not asked.disable_any_whitespace)
    if asked.regex is not None:
        return compiler.compile_regex(asked.regex)
    if asked.choice is not None:
        alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in asked.choice)
        return compiler.compile_grammar(f"root ::= {alternatives}")
    if asked.grammar is not None:
        return compiler.compile_grammar(asked.grammar)
    if asked.structural_tag is not None:
        return compiler.compile_structural_tag(asked.structural_tag)
    return compiler.compile_json_schema('{"type": "object"}')


def enforceable(schema: Any, depth: int = 0) -> Any:
    """A JSON schema as the compiler takes it, if it enforces all of it.

    Raises:
        ValueError: A keyword or a combination of them is not enforced, or the nesting is too deep.
    """
    if depth > MAX_SCHEMA_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_SCHEMA_DEPTH}")
    if not isinstance(schema, Mapping):
        return schema
    if reason := _not_enforced(schema):
        raise ValueError(reason)
    result = dict(schema)
    if missing := [name for name in _listed(schema, "required") if name not in schema.get("properties", ())]:
        result["properties"] = {**schema.get("properties", {}), **dict.fromkeys(missing, True)}
        if "properties" not in schema:
            result.setdefault("additionalProperties", True)
    if schema.keys() & {"minLength", "maxLength"}:
        # The compiler's own way would let control characters into the string.
        least, most = (_length(result.pop(name, "")) for name in ("minLength", "maxLength"))
        result["pattern"] = f"^.{{{least or 0},{most}}}$"
    for name in result.keys() & _SUBSCHEMA:
        result[name] = enforceable(result[name], depth + 1)
    for name in result.keys() & _SUBSCHEMA_LISTS:
        result[name] = [enforceable(item, depth + 1) for item in _listed(result, name)]
    for name in result.keys() & _SUBSCHEMA_MAPS:
        if isinstance(result[name], Mapping):
            result[name] = {key: enforceable(item, depth + 1) for key, item in result[name].items()}
    return result


def _not_enforced(schema: Mapping[str, Any]) -> str | None:
    """What the compiler would pass over in this schema, its parts aside."""
    given = schema.keys()
    if unknown := sorted(_NOT_ENFORCED & given):
        return f"{unknown[0]!r} is not supported"
    if combining := [name for name in _COMBINING if name in given]:
        if beside := [*combining[1:], *sorted(_ASSERTIONS & given)]:
            return f"{beside[0]!r} beside {combining[0]!r} is not supported"
        if len(_listed(schema, "allOf")) > 1:
            return "'allOf' is supported with one schema only"
    elif "type" not in given and (bounds := sorted(_BOUNDS & given)):
        return f"{bounds[0]!r} needs a 'type'"
    if "multipleOf" in given and schema.get("type") != "integer":
        return "'multipleOf' is supported for the type 'integer' only"
    if _ESCAPED.search(str(schema.get("pattern", ""))):
        return "a 'pattern' of characters that JSON escapes is not supported"
    shapes = [name for name in ("pattern", "format", "minLength", "maxLength") if name in given]
    if len(shapes) > 1 and shapes != ["minLength", "maxLength"]:
        return f"{shapes[1]!r} beside {shapes[0]!r} is not supported"
    return None


def _length(value: int | str) -> int | str:
    """A bound of a string's length; empty if there is none."""
    if value != "" and (type(value) is not int or value < 0):
        raise ValueError(f"a string's length must be an integer of at least 0, got {value!r}")
    return value


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    """The list under a keyword; none if it is not there."""
    value = schema.get(name, [])
    if not isinstance(value, list):
        raise ValueError(f"{name!r} must be a list, got {value!r}")
    return value


def _reason(error: Exception) -> str:
    """What the compiler says, without where in its source it says so."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", text)
    return re.sub(r"^Check failed: \(.*?\) is (true|false): ", "", text)
