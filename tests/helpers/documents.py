"""The documents as tests read them: fenced blocks, commands, tables, headings and links."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf


ROOT = Path(__file__).resolve().parents[2]
README, README_ZH = ROOT / "README.md", ROOT / "README_zh.md"
DOCUMENTS = (README, README_ZH, *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: the word behind the fence.
        line: of the opening fence, counted from 1.
    """

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"

    @property
    def keys(self) -> dict:
        """A YAML block as ``llamafactory-cli`` reads it."""
        return OmegaConf.to_container(OmegaConf.create(self.text))

    @property
    def file_name(self) -> str | None:
        """The name that a block's first comment gives it."""
        named = re.match(r"# ([\w.-]+\.yaml)\n", self.text)
        return named and named[1]

    @property
    def commands(self) -> list["Command"]:
        """A bash block's commands, continued lines joined."""
        lines = (shlex.split(line, comments=True) for line in self.text.replace("\\\n", " ").splitlines())
        return [Command(self, words) for words in lines if words]


@dataclass(frozen=True)
class Command:
    """A command of a bash block.

    Attributes:
        words: environment variables first, as they are written.
    """

    block: Block
    words: list[str]

    @property
    def arguments(self) -> list[str]:
        """Program and arguments."""
        return self.words[len(self.environment) :]

    @property
    def environment(self) -> list[str]:
        """``NAME=value`` in front of the program."""
        count = next(i for i, word in enumerate(self.words) if not re.match(r"[A-Z_]+=", word))
        return self.words[:count]

    def __str__(self) -> str:
        return f"{self.block}: {' '.join(self.words)}"


def blocks(document: Path, language: str | None = None) -> list[Block]:
    """A document's fenced blocks, in order."""
    text = document.read_text("utf-8")
    found = [Block(document, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in _FENCE.finditer(text)]
    return [block for block in found if language in (None, block.language)]


def all_blocks(language: str) -> list[Block]:
    """Those of all documents."""
    return [block for document in DOCUMENTS for block in blocks(document, language)]


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return _FENCE.sub("", document.read_text("utf-8"))


def code_spans(document: Path) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", prose(document))


def links(document: Path) -> list[str]:
    """Targets of links and pictures that are not on the web."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)) if "://" not in target]


def headings(document: Path) -> list[tuple[int, str]]:
    """Level and text of every heading."""
    return [(len(marks), text) for marks, text in re.findall(r"^(#+) (.+)$", prose(document), re.MULTILINE)]


def anchors(document: Path) -> set[str]:
    """What links may name behind ``#``, as GitHub makes it of headings."""
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for _, text in headings(document)}


def tables(document: Path) -> list[list[list[str]]]:
    """Rows of cells of every table, the header first and without the line below it."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", prose(document), re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
        found.append([rows[0], *rows[2:]])
    return found
