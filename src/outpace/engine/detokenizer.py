"""From tokens to text that is safe to show: no broken character, no part of a stop string."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from outpace.sampling import SamplingParams

_BROKEN = "\ufffd"  # what decoders write for bytes that are no character (yet)
_MAX_PENDING = 3  # bytes, and so tokens, that an unfinished UTF-8 character can have


class TextStream:
    """Decodes a growing list of tokens piece by piece.

    The pieces joined together are what decoding all the tokens at once gives.
    """

    def __init__(self, tokenizer: Tokenizer, skipped_ids: frozenset[int]) -> None:
        """Starts an empty stream.

        Args:
            tokenizer: Who decodes.
            skipped_ids: Tokens that leave no text.
        """
        self._tokenizer = tokenizer
        self._skipped_ids = skipped_ids
        # The tokens of the piece shown last, as context (a decoder may treat the first token's leading
        # space in its own way), then the tokens that are not yet shown whole.
        self._window: list[int] = []
        self._num_context = 0
        self._num_shown = 0  # characters of the window's text

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that is complete by now."""
        if token_id in self._skipped_ids:
            return ""
        self._window.append(token_id)
        text = self._decode()
        num_broken = len(text) - len(text.rstrip(_BROKEN))
        num_held = num_broken
        if len(self._window) - self._num_context > _MAX_PENDING:
            num_held = min(num_broken, _MAX_PENDING)  # more than one character's bytes: some stay broken
        end = len(text) - num_held
        piece = text[self._num_shown : end]
        if piece and not num_broken:
            del self._window[: self._num_context]
            self._num_context = len(self._window)
            self._num_shown = len(self._decode())
        else:
            self._num_shown = max(self._num_shown, end)
        return piece

    def flush(self) -> str:
        """What is still held back: bytes that never became a character."""
        rest = self._decode()[self._num_shown :]
        self._num_shown += len(rest)
        return rest

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)


class Detokenizer:
    """The text of one answer, with its stop strings.

    Text that may be the beginning of a stop string is held back until it is known. Where several stop
    strings match, the one that is complete first wins, and of those the longest: the outcome does not
    depend on how the text was cut into tokens or the tokens into steps.
    """

    def __init__(self, stream: TextStream, sampling: SamplingParams) -> None:
        self._stream = stream
        self._stops = sampling.stop
        self._beginnings = frozenset(stop[:length] for stop in self._stops for length in range(1, len(stop)))
        self._longest_beginning = max(map(len, self._beginnings), default=0)
        self._keep_stop = sampling.include_stop_str_in_output
        self._ready = ""
        self._held = ""
        self._stopped = False

    def push(self, token_id: int, may_stop: bool = True) -> str | None:
        """Adds a token.

        Args:
            token_id: The token.
            may_stop: Whether it may complete a stop string; if not, such a string is plain text.

        Returns:
            The stop string it completed, if any; the answer's text ends there.
        """
        piece = self._stream.push(token_id)
        if not self._stops:
            self._ready += piece
            return None
        text = self._held + piece
        found = self._find_stop(text) if may_stop else None
        if found is not None:
            end, stop = found
            self._ready += text[: end if self._keep_stop else end - len(stop)]
            self._held, self._stopped = "", True
            return stop
        num_safe = len(text) - self._num_held(text)
        self._ready += text[:num_safe]
        self._held = text[num_safe:]
        return None

    def take(self) -> str:
        """The text that became safe to show since the last call."""
        text, self._ready = self._ready, ""
        return text

    def finish(self) -> str:
        """The rest of the text, all that was held back included (unless a stop string ended it)."""
        if not self._stopped:
            self._ready += self._held + self._stream.flush()
            self._held, self._stopped = "", True
        return self.take()

    def _find_stop(self, text: str) -> tuple[int, str] | None:
        """Where the stop string that is complete first ends, and which it is."""
        best: tuple[int, str] | None = None
        for stop in self._stops:
            # It must end in the new part: what is held back was allowed to pass when it came.
            start = text.find(stop, max(0, len(self._held) - len(stop) + 1))
            end = start + len(stop)
            if start >= 0 and (best is None or (end, -len(stop)) < (best[0], -len(best[1]))):
                best = (end, stop)
        return best

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest_beginning, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0


def detokenizer_factory(tokenizer: PreTrainedTokenizerFast) -> Callable[[SamplingParams], Detokenizer]:
    """A function that starts the detokenizer of a request."""
    backend = tokenizer.backend_tokenizer
    special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    def create(sampling: SamplingParams) -> Detokenizer:
        skipped = special if sampling.skip_special_tokens else frozenset[int]()
        return Detokenizer(TextStream(backend, skipped), sampling)

    return create
