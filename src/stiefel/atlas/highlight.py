"""Python source as HTML with its parts marked, by the standard library's own tokenizer."""

from __future__ import annotations

import io
import keyword
import tokenize
from html import escape

_CLASSES = {tokenize.STRING: "s", tokenize.COMMENT: "c", tokenize.NUMBER: "n"}


def highlight(source: str) -> str:
    """``source`` escaped for HTML, keywords, strings, comments and numbers in ``<span>``.

    Classes are ``k``, ``s``, ``c`` and ``n``. What is not Python comes back escaped and unmarked.
    """
    source = source.strip("\n")
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return escape(source)
    lines = source.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    parts, position = [], 0
    for token in tokens:
        name = _CLASSES.get(token.type)
        if token.type == tokenize.NAME and keyword.iskeyword(token.string):
            name = "k"
        if name is None:
            continue
        start = starts[token.start[0] - 1] + token.start[1]
        end = starts[token.end[0] - 1] + token.end[1]
        parts += [
            escape(source[position:start]),
            f'<span class="{name}">{escape(source[start:end])}</span>',
        ]
        position = end
    return "".join(parts) + escape(source[position:])
