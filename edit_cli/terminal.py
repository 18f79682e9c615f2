"""Text from anywhere, fit to be shown in a terminal or a figure.

Records, runs and edits may hold anything. A terminal obeys control characters: they rename its window, clear it, or
turn the direction of what follows.
"""

from __future__ import annotations

_LAYOUT = "\t\n"
_CONTROLS = (
    *range(0x20),  # C0
    *range(0x7F, 0xA0),  # DEL and C1
    *range(0x202A, 0x202F),  # embeddings and overrides of the direction of writing
    *range(0x2066, 0x206A),  # isolates
    0x2028,  # separators of lines and paragraphs
    0x2029,
    *range(0xD800, 0xE000),  # halves of surrogate pairs, which no encoding takes
)
_ESCAPES = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROLS if chr(code) not in _LAYOUT
}
_ON_ONE_LINE = _ESCAPES | {ord("\n"): "\\n"}


def visible(text: str) -> str:
    """`text` with control characters as escapes (`\\x1b`) that can be read; tabs and line breaks stay."""
    return text.translate(_ESCAPES)


def literal(text: str) -> str:
    """As `visible`, for figures: there, a dollar sign would begin a formula."""
    return visible(text).replace("$", r"\$")


def one_line(text: str) -> str:
    """As `visible`, and a line break is shown as one, too: what is told in a line cannot pretend to be several."""
    return text.translate(_ON_ONE_LINE)
