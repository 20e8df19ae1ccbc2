"""Where the latest tokens occurred before, and what followed: the index behind lookup drafts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from outpace.tree import DraftTree, grow

KEY_LEN = 2  # tokens that index an occurrence; longer matches are found by comparing backwards
MAX_OCCURRENCES = 32  # the most recent ones looked at
_ESCAPE = 2.0  # occurrences that each continuation counts for what may follow instead, after one token
_Match = tuple[int, Sequence[int]]  # tokens that match, and the places of what followed
_END = -1  # between two texts of a log; equal to no token


class SuffixIndex:
    """A log of texts that finds earlier occurrences of a suffix, longest match first.

    Asks the same as a suffix tree with counts (Oliaro et al., SuffixDecoding), restricted to the most recent
    occurrences, at the price of one dictionary entry per token.
    """

    def __init__(self) -> None:
        self._log: list[int] = []
        self._following: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._log)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Goes on with the current text."""
        log = self._log
        for token_id in token_ids:
            log.append(token_id)
            if len(log) >= KEY_LEN:
                self._following[tuple(log[-KEY_LEN:])].append(len(log))

    def end_text(self) -> None:
        """Ends the current text: no match reaches across."""
        self._log.append(_END)

    def matches(self, token_ids: Sequence[int], max_len: int) -> tuple[int, list[int]]:
        """Occurrences of the longest suffix of `token_ids` on record.

        Args:
            token_ids: The text so far; if this index holds it, its own end does not count.
            max_len: Longest suffix to compare.

        Returns:
            Length of the match (0 if there is none) and, for each of its occurrences, the place of the token
            that followed, most recent first.
        """
        places = self._following.get(tuple(token_ids[-KEY_LEN:]), ())
        best = 0
        found: list[int] = []
        for place in places[: -MAX_OCCURRENCES - 1 : -1]:
            if place >= len(self._log) or self._log[place] == _END:
                continue  # nothing followed
            length = self._match_len(token_ids, place, max_len)
            if length > best:
                best, found = length, []
            if length == best:
                found.append(place)
        return best, found

    def tree(
        self, length: int, places: Sequence[int], max_nodes: int, max_depth: int, min_prob: float = 0.0
    ) -> DraftTree:
        """What followed a match, as a tree, best first.

        A confidence is c / (n + 2d/m) for a token that followed c of n occurrences, where d different ones
        did and m tokens match so far, those drafted above it included: the estimate of PPM (method C of
        Moffat, 1990), whose escape shrinks as the match grows. docs/log.md has what was accepted.

        Args:
            length: Of the match.
            places: Its occurrences, both from `matches`.
            max_nodes: Size limit.
            max_depth: Depth limit.
            min_prob: Least probability of a path, as a product of confidences.
        """
        log = self._log

        def children(here: _Match) -> list[tuple[int, float, _Match]]:
            matched, places = here
            followed = [p for p in places if p < len(log) and log[p] != _END]
            counts = Counter(log[p] for p in followed)
            total = len(places) + _ESCAPE * len(counts) / matched
            return [
                (token, count / total, (matched + 1, [p + 1 for p in followed if log[p] == token]))
                for token, count in counts.items()
            ]

        return grow((length, places), children, max_nodes, max_depth, min_prob)

    def _match_len(self, token_ids: Sequence[int], place: int, max_len: int) -> int:
        log, longest = self._log, min(max_len, place, len(token_ids))
        length = KEY_LEN
        while length < longest and log[place - 1 - length] == token_ids[-1 - length]:
            length += 1
        return length
