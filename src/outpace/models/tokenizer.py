"""A model's tokenizer, from a Hugging Face directory or rebuilt from the metadata of a GGUF file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from outpace.errors import ConfigError, InvalidRequestError, OutpaceError, UnsupportedModelError
from outpace.models.gguf_file import GGUFFile
from outpace.models.loader import is_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
_SPACE = "▁"
# How text is cut into words before merging, as the tokenizer.json files of these models have it.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}",
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "default": "gpt-2"}
_PRE_TOKENIZERS = ("gpt-2", "smollm", *_SPLITS)


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer with its special tokens and chat template.

    Args:
        path: A directory with tokenizer.json (or older tokenizer files), or a GGUF file.

    Raises:
        UnsupportedModelError: A GGUF file names a tokenizer that cannot be rebuilt.
        ConfigError: There is no tokenizer, or its files cannot be read.
    """
    if is_gguf(path):
        return _gguf_tokenizer(GGUFFile(path))
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json says everything. AutoTokenizer may put a named class's own pre-tokenizer in place of
    # the file's: transformers 5 drops the digit splitting of SmolLM that way.
    cls = PreTrainedTokenizerFast if (path / "tokenizer.json").exists() else AutoTokenizer
    try:
        return cls.from_pretrained(path, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())  # transformers writes several lines
        raise ConfigError(
            f"cannot load a tokenizer from {path}: {reason}; name one with --tokenizer"
        ) from error


def encode(tokenizer: PreTrainedTokenizerFast, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text of any length.

    Args:
        tokenizer: The model's.
        text: The text.
        add_special_tokens: Whether the tokenizer adds its own, such as one for the beginning.
    """
    # not verbose: it would warn of texts beyond the length it was trained for, which admission refuses
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))


def encode_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    *,
    chat_template: str | None = None,
    add_special_tokens: bool = False,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a conversation, written by a chat template.

    Args:
        tokenizer: The model's.
        messages: The turns so far, each with `role` and `content`.
        chat_template: Used instead of the tokenizer's own.
        add_special_tokens: Whether the tokenizer adds its own tokens to what the template wrote; templates
            usually write them.
        add_generation_prompt: Whether the assistant's turn is opened.
        continue_final_message: Whether the last message's turn is left open instead.
        template_kwargs: Further variables of the template.
        tools: What the model may call, as the OpenAI API describes it; a template may take no notice.

    Raises:
        InvalidRequestError: There is no template, or it refuses these messages or variables.
    """
    variables = dict(template_kwargs or {})
    if chat_template is None and not tokenizer.chat_template:
        raise InvalidRequestError(
            "this model has no chat template: use /v1/completions or LLM.generate, or serve it with "
            "--chat-template",
            "messages",
        )
    taken = inspect.signature(tokenizer.apply_chat_template).parameters.keys() if variables else set()
    if wrong := sorted(variables.keys() & {*taken, "messages"}):
        raise InvalidRequestError(f"chat_template_kwargs cannot set {wrong[0]}", "chat_template_kwargs")
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )
        return encode(tokenizer, text, add_special_tokens)
    except Exception as error:  # a template is a program run on the client's data: it may raise anything
        reason = f"the chat template refuses these messages: {error}"
        raise InvalidRequestError(reason, "messages") from error


def _gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """Wraps the rebuilt tokenizer; a beginning-of-sequence token is added where llama.cpp adds one."""
    from transformers import PreTrainedTokenizerFast

    fields = {k.removeprefix("tokenizer."): v for k, v in file.metadata.items() if k.startswith("tokenizer.")}
    try:
        backend, adds_bos = _backend(file, fields)
        tokens, kinds = fields["ggml.tokens"], fields["ggml.token_type"]
    except KeyError as error:
        raise ConfigError(
            f"{file.path} has no tokenizer.{error.args[0]}; name another tokenizer with --tokenizer"
        ) from error
    except OutpaceError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"{file.path}: its tokenizer cannot be rebuilt: {error}") from error
    backend.add_special_tokens(_added(tokens, kinds, _CONTROL))
    backend.add_tokens(_added(tokens, kinds, _USER_DEFINED))
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{name}_token": fields.get(f"ggml.{key}_token_id") for name, key in named.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields.get("chat_template"),
        clean_up_tokenization_spaces=False,
        add_bos_token=fields.get("ggml.add_bos_token", adds_bos),
        add_eos_token=fields.get("ggml.add_eos_token", False),
        **{name: tokens[token] for name, token in ids.items() if token is not None},
    )


def _backend(file: GGUFFile, fields: dict[str, Any]) -> tuple[Tokenizer, bool]:
    """The rebuilt tokenizer, and whether its models expect a beginning token if the file does not say."""
    match fields["ggml.model"]:
        case "gpt2":
            pre = _pre_tokenizer_name(file, fields)
            return _byte_level(fields, pre), pre == "llama-bpe"
        case "llama":
            return _sentencepiece(fields), True
    raise _unsupported(file, f"tokenizer model {fields['ggml.model']!r}", ("gpt2", "llama"))


def _pre_tokenizer_name(file: GGUFFile, fields: dict[str, Any]) -> str:
    name = fields.get("ggml.pre")
    if name is None:
        raise ConfigError(
            f"{file.path} does not say how to cut text into words (tokenizer.ggml.pre); "
            "name the model's Hugging Face tokenizer with --tokenizer"
        )
    name = _ALIASES.get(name, name)
    if name not in _PRE_TOKENIZERS:
        raise _unsupported(file, f"tokenizer.ggml.pre {name!r}", (*_PRE_TOKENIZERS, *_ALIASES))
    return str(name)


def _byte_level(fields: dict[str, Any], pre: str) -> Tokenizer:
    """Byte-pair encoding over bytes, with the words of the given pre-tokenizer."""
    merges = [tuple(merge.split(" ", 1)) for merge in fields["ggml.merges"]]
    model = BPE(vocab=_vocabulary(fields), merges=merges, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(model)
    words: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _SPLITS)
    if pre in _SPLITS:
        words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated"), words])
    elif pre == "smollm":
        words = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    tokenizer.pre_tokenizer = words
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: dict[str, Any]) -> Tokenizer:
    """Byte-pair encoding over characters, with unknown ones as bytes."""
    unknown = fields.get("ggml.unknown_token_id", 0)
    model = BPE(
        vocab=_vocabulary(fields),
        merges=_merges_of_scores(fields),
        unk_token=fields["ggml.tokens"][unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    replace = normalizers.Replace(" ", _SPACE)
    restore: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        restore.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(restore)
    return tokenizer


def _vocabulary(fields: dict[str, Any]) -> dict[str, int]:
    # Unused entries pad the vocabulary to the rows of the embedding.
    return {
        token: index
        for index, (token, kind) in enumerate(
            zip(fields["ggml.tokens"], fields["ggml.token_type"], strict=True)
        )
        if kind != _UNUSED
    }


def _merges_of_scores(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs that SentencePiece would join, best first: it joins whatever makes a better-scored token."""
    entries = zip(fields["ggml.tokens"], fields["ggml.scores"], fields["ggml.token_type"], strict=True)
    scores = {
        token: score for token, score, kind in entries if kind not in (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)
    }
    return [
        (token[:cut], token[cut:])
        for token in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]


def _added(tokens: list[str], kinds: list[int], kind: int) -> list[AddedToken]:
    special = kind == _CONTROL
    return [
        AddedToken(token, normalized=False, special=special)
        for token, its_kind in zip(tokens, kinds, strict=True)
        if its_kind == kind
    ]


def _unsupported(file: GGUFFile, what: str, known: tuple[str, ...]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{file.path}: {what} cannot be rebuilt (those that can: {', '.join(known)}); "
        "name the model's Hugging Face tokenizer with --tokenizer"
    )
