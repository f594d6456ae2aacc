"""GPT-2's byte-level byte-pair encoding, from the words and merges that a checkpoint carries."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

# After numerals are split off, Python's [^\W_] is what the published pattern calls \p{L}.
_PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def byte_alphabet() -> list[str]:
    """The printable character that stands for each of the 256 bytes in GPT-2's vocabulary.

    Printable Latin-1 bytes stand for themselves, the other 68 for U+0100 upwards in their order.
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in itself else chr(next(others)) for byte in range(256)]


class BytePairEncoding:
    """Text to token ids and back.

    Text is cut into numerals (one each), contractions, runs of letters or of punctuation with an
    optional space before, and white space; within a piece the pair of symbols that stands first in
    ``merges`` is joined, everywhere it occurs, until none is left. Nothing in the text is read as a
    control token.

    Args:
        tokens: The vocabulary in the order of ids, in the letters of :func:`byte_alphabet`.
        merges: Pairs ``"left right"``, most frequent first.

    Raises:
        ValueError: a token or a merge comes twice, a merge is not a pair, or the result of one is
            not in the vocabulary.
    """

    def __init__(self, tokens: Sequence[str], merges: Sequence[str]) -> None:
        self.ids = {token: number for number, token in enumerate(tokens)}
        if len(self.ids) != len(tokens):
            raise ValueError(f"{len(tokens) - len(self.ids)} tokens come twice")
        self.tokens = tuple(tokens)
        self._ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(merges):
            left, separator, right = merge.partition(" ")
            if not (left and separator and right) or " " in right:
                raise ValueError(f"merge {rank} must be two symbols and a space, got {merge!r}")
            if left + right not in self.ids:
                raise ValueError(f"merge {rank} makes {left + right!r}, which is not a token")
            if (left, right) in self._ranks:
                raise ValueError(f"merge {merge!r} comes twice")
            self._ranks[left, right] = rank
        self._letters = byte_alphabet()
        self._bytes = {letter: byte for byte, letter in enumerate(self._letters)}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no token is added at either end.

        Raises:
            ValueError: a byte of the text is not in the vocabulary, or the text has a lone
                surrogate.
        """
        found: list[int] = []
        for piece in _pieces(text):
            symbols = self._merged([self._letters[byte] for byte in piece.encode("utf-8")])
            try:
                found += [self.ids[symbol] for symbol in symbols]
            except KeyError as error:
                raise ValueError(f"the vocabulary has no token for {error.args[0]!r}") from None
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            IndexError: an id outside the vocabulary.
        """
        raw = bytearray()
        for number in ids:
            if not 0 <= number < len(self.tokens):
                raise IndexError(f"token ids go from 0 to {len(self.tokens) - 1}, got {number}")
            token = self.tokens[number]
            if all(letter in self._bytes for letter in token):
                raw += bytes(self._bytes[letter] for letter in token)
            else:  # a control token, spelt as it is
                raw += token.encode("utf-8")
        return raw.decode("utf-8", errors="replace")

    def _merged(self, symbols: list[str]) -> list[str]:
        while len(symbols) > 1:
            pairs = pairwise(symbols)
            rank, best = min((self._ranks.get(pair, len(self._ranks)), pair) for pair in pairs)
            if rank == len(self._ranks):
                break
            joined: list[str] = []
            at = 0
            while at < len(symbols):
                if tuple(symbols[at : at + 2]) == best:
                    joined.append(best[0] + best[1])
                    at += 2
                else:
                    joined.append(symbols[at])
                    at += 1
            symbols = joined
        return symbols


def _pieces(text: str) -> list[str]:
    """Numerals one by one, the rest by the pattern."""
    found: list[str] = []
    start = 0
    for at, letter in enumerate(text):
        if unicodedata.category(letter).startswith("N"):
            found += _PIECES.findall(text[start:at])
            found.append(letter)
            start = at + 1
    return found + _PIECES.findall(text[start:])
