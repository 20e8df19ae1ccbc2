"""Text of an answer: whole characters, no partial stop string, and in sum exactly what decoding gives."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from outpace.engine.detokenizer import Detokenizer, detokenizer_factory
from outpace.sampling import SamplingParams
from tiny import EOS, byte_tokenizer

TOKENIZER = byte_tokenizer()
CREATE = detokenizer_factory(TOKENIZER)
SENTENCES = (
    "naïve café – 日本語 🙂 👩‍👩‍👧‍👦 done",
    "plain",
    " leading and  double  spaces ",
    "\ufffd real replacement",
)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """The decoder of Llama 2 and Mistral: bytes as tokens of their own, the first space stripped."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "lo", "!", "é"]
    model = models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True)
    backend = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def pieces(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    """What is shown after each token, and at the end."""
    shown = []
    for token_id in token_ids:
        assert detokenizer.push(token_id) is None
        shown.append(detokenizer.take())
    return [*shown, detokenizer.finish()]


def answer(text: str, **sampling: Any) -> tuple[str, str | None, list[str]]:
    """The text shown for an answer, what stopped it, and the pieces."""
    detokenizer = CREATE(SamplingParams(**sampling))
    shown = []
    for byte in text.encode():
        stop = detokenizer.push(byte)
        shown.append(detokenizer.take())
        if stop is not None:
            return "".join([*shown, detokenizer.finish()]), stop, shown
    return "".join([*shown, detokenizer.finish()]), None, shown


@pytest.mark.parametrize("text", SENTENCES)
def test_pieces_are_whole_characters_and_join_to_the_text(text: str) -> None:
    shown = pieces(CREATE(SamplingParams()), list(text.encode()))
    assert "".join(shown) == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(shown)


def test_a_character_is_shown_with_its_last_byte() -> None:
    detokenizer = CREATE(SamplingParams())
    assert [(detokenizer.push(b), detokenizer.take())[1] for b in "é🙂".encode()] == [
        "",
        "é",
        "",
        "",
        "",
        "🙂",
    ]


def test_random_bytes_join_to_what_decoding_them_together_gives() -> None:
    rng = random.Random(3)
    for _ in range(300):
        ids = [rng.choice([rng.randrange(256), rng.randrange(0x80, 0xC0), 0xE2, 0xF0]) for _ in range(40)]
        assert "".join(pieces(CREATE(SamplingParams()), ids)) == TOKENIZER.decode(ids)


def test_bytes_that_never_become_a_character_do_not_hold_the_text_back() -> None:
    shown = pieces(CREATE(SamplingParams()), [0x80] * 10)
    assert "".join(shown[:-1]) == "\ufffd" * 7
    assert "".join(shown) == "\ufffd" * 10


def test_an_unfinished_character_is_shown_broken_only_at_the_end() -> None:
    shown = pieces(CREATE(SamplingParams()), list(b"ab\xf0\x9f"))
    assert shown == ["a", "b", "", "", "\ufffd"]


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    ids = [*b"hi", EOS, *b"!"]
    assert "".join(pieces(CREATE(SamplingParams()), ids)) == "hi!"
    assert "".join(pieces(CREATE(SamplingParams(skip_special_tokens=False)), ids)) == "hi<|eos|>!"


def test_sentencepiece_text_joins_to_what_decoding_gives() -> None:
    tokenizer = sentencepiece_tokenizer()
    create = detokenizer_factory(tokenizer)
    hello, world, space, euro = 258, 259, 257, [1 + b for b in "€".encode()]
    for ids in (
        [hello, world],
        [space, hello],
        [hello, space, space, world],
        [*euro, world],
        [hello, *euro, *euro],
    ):
        assert "".join(pieces(create(SamplingParams()), ids)) == tokenizer.decode(ids)
    assert pieces(create(SamplingParams()), [hello, *euro, world]) == ["Hello", "", "", "€", " world", ""]
    broken = [1 + 0xE2] * 6
    assert "".join(pieces(create(SamplingParams()), broken)) == tokenizer.decode(broken)


def test_a_stop_string_ends_the_text_before_it() -> None:
    assert answer("one STOP two", stop=("STOP",))[:2] == ("one ", "STOP")


def test_a_stop_string_may_be_kept() -> None:
    assert answer("one STOP two", stop=("STOP",), include_stop_str_in_output=True)[:2] == ("one STOP", "STOP")


def test_a_partial_stop_string_is_never_shown() -> None:
    text, stop, shown = answer("a STO, a STOP", stop=("STOP",))
    assert (text, stop) == ("a STO, a ", "STOP")
    assert all("S" not in piece or "STO," in piece for piece in shown)


def test_what_was_held_back_is_shown_at_the_end() -> None:
    assert answer("a STO", stop=("STOP",))[:2] == ("a STO", None)


def test_of_several_stop_strings_the_first_to_be_complete_wins() -> None:
    assert answer("abcd", stop=("abcd", "bc"))[:2] == ("a", "bc")
    assert answer("abcd", stop=("bc", "abc"))[:2] == ("", "abc")


def test_overlapping_beginnings_do_not_hide_a_stop_string() -> None:
    assert answer("aaab", stop=("aab",))[:2] == ("a", "aab")
    assert answer("ababac", stop=("abac",))[:2] == ("ab", "abac")


def test_a_stop_string_of_several_bytes_per_character_is_found() -> None:
    assert answer("so 日本 x", stop=("本",))[:2] == ("so 日", "本")


def test_a_token_that_may_not_stop_makes_its_stop_string_plain_text() -> None:
    detokenizer = CREATE(SamplingParams(stop=("ab", "abcd")))
    assert detokenizer.push(ord("a"), may_stop=False) is None
    assert detokenizer.push(ord("b"), may_stop=False) is None
    assert detokenizer.push(ord("x")) is None
    assert detokenizer.take() == "abx"
    for char in "ab":
        stop = detokenizer.push(ord(char))
    assert stop == "ab"
    assert detokenizer.finish() == ""


def test_stop_strings_do_not_depend_on_how_text_is_cut_into_tokens() -> None:
    tokenizer = sentencepiece_tokenizer()
    detokenizer = detokenizer_factory(tokenizer)(SamplingParams(stop=("lo!", "o w")))
    assert [detokenizer.push(i) for i in (258, 259)] == [None, "o w"]
    assert detokenizer.finish() == "Hell"
