"""Tokenizers, from directories and rebuilt from GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import pre_tokenizers

from checkpoints import SPECIAL_TOKENS, finish, write_checkpoint, write_gguf, write_tokenizer
from outpace.errors import ConfigError, UnsupportedModelError
from outpace.models.tokenizer import load_tokenizer

TEXTS = [
    "the quick brown fox",
    "  two  spaces, a tab\tand\n\nlines ",
    "digits 1984 and 7x13",
    "it's café 日本語 🦊 <|im_start|>user<|im_end|>",
    "",
]
MESSAGES = [{"role": "user", "content": "the dog"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def byte_level(path: Path, pre: str | None, more: dict[str, int] | None = None, **settings: Any) -> Path:
    """A GGUF file with a byte-level vocabulary of 260 tokens, the last of them "ab", and `more` by kind."""
    more = more or {}
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", *more]
    kinds = [3, 3, 3, *[1] * 257, *more.values()]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(settings.get("model", "gpt2"))
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(settings.get("merges", ["a b"]))
    if "add_bos" in settings:
        writer.add_add_bos_token(settings["add_bos"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    finish(writer)
    return path


def sentencepiece(path: Path, **settings: Any) -> Path:
    """A GGUF file with a small SentencePiece vocabulary."""
    pieces = ["▁", "a", "b", "c", "ab", "▁ab", "bc", "abc"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *pieces]
    scores = [0.0] * 259 + [-9.0, -10.0, -11.0, -12.0, -2.0, -3.0, -1.0, -4.0]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(pieces))
    if settings.get("scores", True):
        writer.add_token_scores(scores)
    if "add_space_prefix" in settings:
        writer.add_add_space_prefix(settings["add_space_prefix"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    finish(writer)
    return path


def words(tokenizer: Any, text: str) -> list[str]:
    return [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_a_gguf_encodes_like_the_directory_it_came_from(checkpoint: Path) -> None:
    directory = load_tokenizer(checkpoint)
    rebuilt = load_tokenizer(write_gguf(checkpoint, checkpoint / "model.gguf"))
    for text in TEXTS:
        ids = directory(text).input_ids
        assert rebuilt(text).input_ids == ids
        assert rebuilt.decode(ids) == directory.decode(ids) == text
    assert rebuilt.apply_chat_template(MESSAGES, tokenize=False) == directory.apply_chat_template(
        MESSAGES, tokenize=False
    )
    assert rebuilt.all_special_ids == directory.all_special_ids
    assert (rebuilt.bos_token_id, rebuilt.eos_token, rebuilt.eos_token_id) == (1, "<|im_end|>", 2)
    assert len(rebuilt) == len(directory)


def test_special_tokens_are_whole_and_left_out_when_asked(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint / "model.gguf")
    ids = tokenizer("<|im_start|>the<|im_end|>").input_ids
    assert ids[0] == 1
    assert ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the"


def test_the_file_beats_the_class_it_names(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "GPT2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert words(load_tokenizer(tmp_path), "in 1984") == ["in", "Ġ", "1", "9", "8", "4"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["it", "'s", "Ġ12345", "Ġ", "Ġx", "'", "S"]),
        ("default", ["it", "'s", "Ġ12345", "Ġ", "Ġx", "'", "S"]),
        ("smollm", ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġx", "'", "S"]),
        ("llama-bpe", ["it", "'s", "Ġ", "123", "45", "Ġ", "Ġx", "'S"]),
        ("qwen2", ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġx", "'S"]),
    ],
)
def test_each_pre_tokenizer_cuts_words_as_its_models_were_trained(
    tmp_path: Path, pre: str, expected: list[str]
) -> None:
    assert words(load_tokenizer(byte_level(tmp_path / "a.gguf", pre)), "it's 12345  x'S") == expected


def test_qwen_composes_characters_before_encoding(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "a.gguf", "qwen2"))
    assert tokenizer("cafe\u0301").input_ids == tokenizer("caf\u00e9").input_ids


def test_llama_3_takes_whole_words_of_its_vocabulary_without_merging(tmp_path: Path) -> None:
    # "abc" is a token, but no merge leads to it.
    path = byte_level(tmp_path / "a.gguf", "llama-bpe", {"abc": 1}, add_bos=False)
    assert load_tokenizer(path).tokenize("abc") == ["abc"]
    path = byte_level(tmp_path / "b.gguf", "gpt-2", {"abc": 1})
    assert load_tokenizer(path).tokenize("abc") == ["ab", "c"]


def test_a_beginning_token_is_added_where_the_model_expects_one(tmp_path: Path) -> None:
    assert load_tokenizer(byte_level(tmp_path / "a.gguf", "llama-bpe"))("a").input_ids[0] == 1
    assert load_tokenizer(byte_level(tmp_path / "b.gguf", "llama-bpe", add_bos=False))("a").input_ids[0] != 1
    assert load_tokenizer(byte_level(tmp_path / "c.gguf", "qwen2"))("a").input_ids[0] != 1
    assert load_tokenizer(byte_level(tmp_path / "d.gguf", "qwen2", add_bos=True))("a").input_ids[0] == 1
    with_bos = load_tokenizer(tmp_path / "a.gguf")
    assert with_bos("a", add_special_tokens=False).input_ids[0] != 1


def test_user_defined_tokens_are_whole_but_not_special(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "a.gguf", "gpt-2", {"<think>": 4}))
    ids = tokenizer("a<think>").input_ids
    assert ids[-1] == 260
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>"


def test_padding_entries_are_not_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "a.gguf", "gpt-2", {"[PAD260]": 5}))
    assert len(tokenizer) == 260


def test_sentencepiece_joins_the_best_scored_pair_first(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "a.gguf"))
    # "bc" has the best score, so "ab" never forms; then "a" + "bc" makes "abc".
    assert tokenizer.tokenize("abc") == ["▁", "abc"]
    assert tokenizer.tokenize("ab") == ["▁ab"]
    assert tokenizer("ab").input_ids[0] == 1


def test_sentencepiece_spells_unknown_characters_in_bytes(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "a.gguf"))
    assert tokenizer.tokenize("é") == ["▁", "<0xC3>", "<0xA9>"]
    for text in ["abc é ab", " ab", "ab\n"]:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_sentencepiece_without_a_space_in_front(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "a.gguf", add_space_prefix=False))
    assert tokenizer.tokenize("ab ab") == ["ab", "▁ab"]
    assert tokenizer.decode(tokenizer(" ab").input_ids, skip_special_tokens=True) == " ab"


def test_other_tokenizers_are_refused_by_name_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"tokenizer model 't5' .*gpt2, llama.*--tokenizer"):
        load_tokenizer(byte_level(tmp_path / "a.gguf", "gpt-2", model="t5"))
    with pytest.raises(UnsupportedModelError, match=r"'chatglm-bpe' .*smollm.*--tokenizer"):
        load_tokenizer(byte_level(tmp_path / "b.gguf", "chatglm-bpe"))
    with pytest.raises(ConfigError, match="how to cut text into words"):
        load_tokenizer(byte_level(tmp_path / "c.gguf", None))
    with pytest.raises(ConfigError, match=r"no tokenizer\.ggml\.scores"):
        load_tokenizer(sentencepiece(tmp_path / "d.gguf", scores=False))


def test_merges_that_do_not_fit_the_vocabulary_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.gguf: .*out of vocabulary"):
        load_tokenizer(byte_level(tmp_path / "a.gguf", "gpt-2", merges=["a b", "c d"]))


def test_a_gguf_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    finish(writer)
    with pytest.raises(ConfigError, match=r"has no tokenizer\.ggml\.model"):
        load_tokenizer(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "files",
    [{}, {"tokenizer.json": "{}"}, {"config.json": '{"model_type": "llama", "vocab_size": 8}'}],
    ids=["none", "an empty one", "only a model's"],
)
def test_a_directory_without_a_tokenizer_is_one_clear_line(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(
        ConfigError, match=r"cannot load a tokenizer from .* name one with --tokenizer"
    ) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
