"""Prompts from a JSON or JSONL file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LMTPError


_FIELDS = "prompt, instruction (with an optional input) or messages"


class MalformedPrompt(ValueError):
    """An invalid entry. The caller adds the entry's place in the file to the message."""


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer: dicts with `role` and `content`, the last one from the user."""

    messages: tuple[dict[str, str], ...]

    @property
    def text(self) -> str:
        """The last user message."""
        return self.messages[-1]["content"]


def build_prompt(content: str | list[dict[str, str]], system: str | None = None) -> Prompt:
    """Build a prompt from a user's text or from messages.

    Args:
        content: The text, or messages. A trailing assistant message is dropped.
        system: System text, used if the messages do not start with a system message.

    Raises:
        MalformedPrompt: A message lacks role or content, or the last message is not from the user.
    """
    if isinstance(content, str):
        content = [{"role": "user", "content": content}]
    if not isinstance(content, list):
        raise MalformedPrompt(f"expected text or a list of messages, found {type(content).__name__}")
    messages = []
    for message in content:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise MalformedPrompt("every message needs a role and a content that is text")
        if message.get("role") not in ("system", "user", "assistant"):
            raise MalformedPrompt(f"role {message.get('role')!r} is not system, user or assistant")
        messages.append({"role": message["role"], "content": message["content"]})
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise MalformedPrompt("the conversation must end with a user message that is not empty")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Prompt(tuple(messages))


def prompts_from_file(path: str | Path) -> list[Prompt]:
    """Read prompts from a JSON array or a JSONL file.

    An entry is a string or an object with `prompt` (a string or messages), `instruction` and optional `input`, or
    `messages`. Objects may also have `system`. Other fields are ignored.

    Raises:
        LMTPError: The file cannot be read, or an entry is malformed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise LMTPError(f"Prompts file {path} cannot be read ({reason}): name a JSON or JSONL file.") from error
    prompts = []
    for place, entry in _entries(path, text):
        try:
            prompts.append(_prompt_of_entry(entry))
        except MalformedPrompt as error:
            raise LMTPError(f"Prompts file {path}, {place}: {error}.") from error
    if not prompts:
        raise LMTPError(f"Prompts file {path} holds no prompts: write one JSON object a line with {_FIELDS}.")
    return prompts


def _entries(path: str | Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield each entry with its place in the file."""
    if text.lstrip().startswith("["):
        for number, entry in enumerate(_parse(path, text, 1), start=1):
            yield f"entry {number}", entry
        return
    # Not splitlines(), which also splits at U+2028; JSON strings may contain it.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parse(path, line, number)


def _parse(path: str | Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise LMTPError(
            f"Prompts file {path}, line {line}: not JSON ({error.msg}); write one object a line, or one array."
        ) from error


def _prompt_of_entry(entry: Any) -> Prompt:
    if isinstance(entry, str):
        return build_prompt(entry)
    if not isinstance(entry, dict):
        raise MalformedPrompt(f"expected a string or an object with {_FIELDS}, found {type(entry).__name__}")
    content = next((entry[field] for field in ("messages", "prompt", "instruction") if entry.get(field)), None)
    if content is None:
        raise MalformedPrompt(f"expected {_FIELDS}, found {', '.join(entry) or 'nothing'}")
    if isinstance(content, str) and "instruction" in entry and entry.get("input"):
        content = f"{content}\n{entry['input']}"
    system = entry.get("system")
    return build_prompt(content, system if isinstance(system, str) else None)
