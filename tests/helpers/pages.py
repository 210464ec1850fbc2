"""README, CONTRIBUTING, SECURITY and the pages of the site: their text, examples and links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@dataclass(frozen=True)
class Page:
    """A page, by its path from the root."""

    path: str

    def __str__(self) -> str:
        return self.path

    @property
    def text(self) -> str:
        return (ROOT / self.path).read_text()

    @property
    def prose(self) -> str:
        """Without what a program prints or reads, pictures, and where links lead."""
        text = re.sub(r"^```.*?^```$", "", self.text, flags=re.M | re.S)
        return re.sub(r"`[^`\n]*`|!\[.*?\]\(.*?\)|(?<=\])\((?!glossary).*?\)", "", text)

    @property
    def words(self) -> int:
        """As ``wc -w`` counts them, without what a program prints or reads."""
        return len(re.sub(r"^```.*?^```$", "", self.text, flags=re.M | re.S).split())

    def code(self, language: str) -> list[str]:
        """The blocks in a language, in their order."""
        return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", self.text, re.M | re.S)

    def commands(self) -> list[tuple[str, list[str]]]:
        """The scripts of this project that it calls, and with which arguments."""
        text = self.text.replace("\\\n", " ")
        found = re.findall(r"(?:python(?: -m)?|^) *scripts/(\w+)\.py([^`#\n]*)", text, re.M)
        found += re.findall(r"torchrun [^`#\n]*scripts/(\w+)\.py([^`#\n]*)", text)
        return [(script, shlex.split(arguments)) for script, arguments in found]

    def links(self) -> list[Path]:
        """The files that it links to."""
        found = re.findall(r"\]\((?!\w+:)([^)#\s]+)", self.text)
        return [(ROOT / self.path).parent / link for link in found]


def everywhere() -> list[Page]:
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    paths = [*top, *sorted(DOCS.rglob("*.md"))]
    return [Page(path.relative_to(ROOT).as_posix()) for path in paths if "_build" not in path.parts]


def example(name: str) -> Any:
    """The class of this name, from the one example in which it stands."""
    blocks = [block for page in everywhere() for block in page.code("python")]
    (text,) = [block for block in blocks if f"class {name}(" in block]
    names: dict[str, Any] = {}
    exec(text, names)
    return names[name]
