"""Words of other workers, or out of the store that they meet in: shown as theirs, never as ours.

Whoever reaches the store can write anything there. People read messages in terminals, and programs
read them in logs. So what others say is one line of limited length, in quotation marks.
"""

from __future__ import annotations

_MOST_CHARACTERS = 500


def quote(words: str | bytes, limit: int = _MOST_CHARACTERS) -> str:
    r"""What another worker says, in quotation marks.

    Args:
        words: of the other; bytes should be UTF-8.
        limit: characters that are shown.

    Returns:
        One line without control characters, which are written as in Python (``\n``, ``\x1b``).
    """
    if isinstance(words, bytes):
        words = words[: 4 * limit].decode(errors="replace")
    shown = escape(words.replace('"', "'"), limit)
    left_out = len(words) - limit
    return f'"{shown}"' if left_out <= 0 else f'"{shown}" (and {left_out} characters more)'


def escape(name: str, limit: int = _MOST_CHARACTERS) -> str:
    """What another worker calls itself or a thing, without control characters."""
    # Not printable: control characters, line ends of all scripts, marks that turn the direction.
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in name[:limit]
    )
