"""Between text and tokens: prompts in, single tokens out."""

from __future__ import annotations

import asyncio
import re
from functools import cache, lru_cache, partial
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from outpace.errors import ConfigError, InvalidRequestError
from outpace.models.tokenizer import encode, encode_chat
from outpace.server.protocol import ChatMessage
from outpace.server.tools import ToolFormat, in_words

# Tokenising this much takes about a millisecond: longer texts go to a thread, so that streams do not stutter.
MAX_CHARS_ON_LOOP = 4096

_GREETING = [{"role": "user", "content": "Hello"}]
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "Does f.", "parameters": {"type": "object", "properties": {}}},
}


class Tokens:
    """The served model's tokenizer and chat template.

    Args:
        tokenizer: A fast transformers tokenizer.
        chat_template: Replaces the tokenizer's own template, if given.
        tool_format: How calls are written where the template knows nothing of tools.

    Raises:
        ConfigError: The template has a syntax error.
    """

    def __init__(
        self, tokenizer: Any, chat_template: str | None = None, tool_format: ToolFormat | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template
        self._tool_format = tool_format
        self._is_byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
        self._added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
        self._size = len(tokenizer)
        self.of = lru_cache(maxsize=2**16)(self._of)
        self._knows_tools = self._try_template()

    async def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""

        def encode_all() -> list[list[int]]:
            return [encode(self._tokenizer, text, add_special_tokens) for text in texts]

        if len(texts) == 1 and len(texts[0]) <= MAX_CHARS_ON_LOOP:
            return encode_all()
        return await asyncio.to_thread(encode_all)

    async def encode_chat(
        self,
        messages: list[ChatMessage],
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, written by the chat template.

        Args:
            messages: The turns so far.
            add_generation_prompt: Whether the assistant's turn is opened; None is yes, unless the final
                message is continued.
            continue_final_message: Leave the last message open instead.
            add_special_tokens: Whether the tokenizer adds its own tokens to what the template wrote.
            template_kwargs: Further variables of the template.
            tools: What the model may call; a template that knows no tools has them in the system message.

        Raises:
            InvalidRequestError: There is no template, or it refuses these messages.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other", "add_generation_prompt"
            )
        opens_turn = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        conversation = [message.for_template() for message in messages]
        if not self._knows_tools and self._tool_format is not None:
            conversation, tools = in_words(conversation, tools or [], self._tool_format), None
        lay_out = partial(
            encode_chat,
            self._tokenizer,
            conversation,
            chat_template=self._template,
            add_special_tokens=add_special_tokens,
            add_generation_prompt=opens_turn,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            tools=tools,
        )
        if sum(len(message["content"]) for message in conversation) <= MAX_CHARS_ON_LOOP:
            return lay_out()
        return await asyncio.to_thread(lay_out)

    async def decode(self, token_ids: list[int], param: str) -> str:
        """Text of token ids, special tokens included.

        Args:
            token_ids: The tokens.
            param: The field they came in, for the error.

        Raises:
            InvalidRequestError: An id is not in the vocabulary.
        """
        if token_ids and max(token_ids) >= self._size:
            limit = f"the vocabulary ends at {self._size - 1}"
            raise InvalidRequestError(f"{param} holds token id {max(token_ids)}; {limit}", param)
        if len(token_ids) <= MAX_CHARS_ON_LOOP:
            return str(self._tokenizer.decode(token_ids))
        return str(await asyncio.to_thread(self._tokenizer.decode, token_ids))

    def strings(self, token_ids: list[int]) -> list[str]:
        """Each token as the vocabulary writes it."""
        return [str(token) for token in self._tokenizer.convert_ids_to_tokens(token_ids)]

    def _try_template(self) -> bool:
        """Compiles the template, for the first request's sake and to find a broken one before any.

        Returns:
            Whether it takes notice of tools.
        """
        write = partial(encode_chat, self._tokenizer, _GREETING, chat_template=self._template)
        try:
            return write() != write(tools=[_TOOL])
        except InvalidRequestError as error:
            if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                raise _broken_template(error.__cause__) from None
            return False

    def _of(self, token_id: int) -> tuple[str, list[int]]:
        """Text and bytes of a single token; a token may be part of a character only."""
        raw = self._tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self._added or raw is None:
            content = self._added.get(token_id, "").encode()
        elif self._is_byte_level and all(character in _byte_level_bytes() for character in raw):
            content = bytes(_byte_level_bytes()[character] for character in raw)
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", raw):
            content = bytes([int(raw[3:5], 16)])
        else:
            content = raw.replace("▁", " ").encode()
        return content.decode(errors="replace"), list(content)


def check_template(template: str) -> None:
    """Compiles a chat template, for which no tokenizer is needed.

    Raises:
        ConfigError: It has a syntax error.
    """
    try:
        render_jinja_template([], chat_template=template)
    except jinja2.TemplateSyntaxError as error:
        raise _broken_template(error) from None


def _broken_template(error: jinja2.TemplateSyntaxError) -> ConfigError:
    return ConfigError(f"the chat template has a syntax error in line {error.lineno}: {error}")


@cache
def _byte_level_bytes() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte in byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
