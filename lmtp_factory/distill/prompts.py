"""Prompts that somebody else wrote: from a JSON or JSONL file, or from a dataset that LLaMA-Factory knows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.registry import find_datasets
from ..errors import LMTPError, first_line
from .rows import is_self_distilled


_FIELDS = "`prompt`, `instruction` (with an optional `input`) or `messages`"


class _Malformed(ValueError):
    """What is wrong with one entry; the caller knows where it stands."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the model's answer: dicts of `role` and `content`, the last one the user's."""

    messages: tuple[dict[str, str], ...]

    @property
    def text(self) -> str:
        """The user's last words."""
        return self.messages[-1]["content"]


def user_prompt(text: str, system: str | None = None) -> Prompt:
    """A conversation of one user message, after an optional system text."""
    system_messages = ({"role": "system", "content": system},) if system else ()
    return Prompt((*system_messages, {"role": "user", "content": text}))


def prompts_from_file(path: str | Path) -> list[Prompt]:
    """Prompts out of a JSON array or a JSONL file.

    An entry is a string, or an object with `prompt` (a string or messages), `instruction` and `input`, or
    `messages`; an optional `system`; other fields are ignored. A trailing assistant message is dropped.

    Raises:
        LMTPError: the file is not there, or an entry is malformed; the sentence names file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise LMTPError(f"prompts file `{path}` cannot be read ({reason}).") from error
    entries = _array_entries if text.lstrip().startswith("[") else _line_entries
    prompts = []
    try:
        for line, entry in entries(text):
            prompts.append(_prompt_of_line(path, line, entry))
    except json.JSONDecodeError as error:
        raise LMTPError(f"{path}, line {error.lineno}: not JSON ({error.msg}); write one object a line.") from error
    if not prompts:
        raise LMTPError(f"prompts file `{path}` holds no prompts: write one JSON object a line with {_FIELDS}.")
    return prompts


def _prompt_of_line(path: str | Path, line: int, entry: Any) -> Prompt:
    try:
        return _prompt(entry)
    except _Malformed as error:
        raise LMTPError(f"{path}, line {line}: {error}.") from error


def _line_entries(text: str) -> Iterator[tuple[int, Any]]:
    # not splitlines(): JSON strings may hold U+2028, which is no line end in JSONL
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            error.lineno = number
            raise
        yield number, entry


def _array_entries(text: str) -> Iterator[tuple[int, Any]]:
    entries = json.loads(text)  # a syntax error is reported with the line that it stands in
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    for _ in entries:
        while text[position] in " \t\r\n,":
            position += 1
        line = text.count("\n", 0, position) + 1
        entry, position = decoder.raw_decode(text, position)
        yield line, entry


def _prompt(entry: Any) -> Prompt:
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise _Malformed(f"expected a string or an object with {_FIELDS}, found {type(entry).__name__}")
    content = next((entry[field] for field in ("messages", "prompt", "instruction") if entry.get(field)), None)
    if content is None:
        raise _Malformed(f"expected {_FIELDS}, found {', '.join(f'`{field}`' for field in entry) or 'nothing'}")
    if isinstance(content, str):
        query = entry.get("input") if "instruction" in entry else None
        content = [{"role": "user", "content": f"{content}\n{query}" if query else content}]
    messages = _messages(content)
    system = entry.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Prompt(tuple(messages))


def _messages(content: Any) -> list[dict[str, str]]:
    if not isinstance(content, list):
        raise _Malformed(f"expected text or a list of messages, found {type(content).__name__}")
    messages = []
    for message in content:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise _Malformed("every message needs a `role` and a `content` that is text")
        if message.get("role") not in ("system", "user", "assistant"):
            raise _Malformed(f"role {message.get('role')!r} is not system, user or assistant")
        messages.append({"role": message["role"], "content": message["content"]})
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise _Malformed("the conversation must end with a user message that is not empty")
    return messages


def prompts_from_dataset(names: list[str], dataset_dir: str) -> tuple[list[Prompt], int]:
    """Prompts of datasets registered with LLaMA-Factory (alpaca, sharegpt or openai format), answers dropped.

    Returns:
        the prompts, and how many rows were left out because they have tools, media or no user text.

    Raises:
        LMTPError: LLaMA-Factory cannot find or read a dataset.
    """
    from datasets.exceptions import DatasetsError
    from llamafactory.data import loader, parser
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import TrainingArguments

    prompts: list[Prompt] = []
    skipped = 0
    # upstream's loader wants these objects; nothing is written to output_dir
    model_args = ModelArguments(model_name_or_path="unused")
    data_args = DataArguments(dataset=",".join(names), dataset_dir=dataset_dir)
    with tempfile.TemporaryDirectory() as nowhere:
        training_args = TrainingArguments(output_dir=nowhere, report_to="none", use_cpu=True)
        try:
            for attr in find_datasets(names, dataset_dir, parser.get_dataset_list):
                if is_self_distilled(attr):  # its columns are ids; the text of the prompt stands beside them
                    attr.prompt, attr.response = "instruction", "output"
                if attr.formatting == "openai":
                    # upstream's openai converter adds a system text of Nemotron's to every row; the plain converter
                    # reads the same role and content tags
                    attr.formatting = "sharegpt"
                for row in loader._load_single_dataset(attr, model_args, data_args, training_args):
                    prompt = _aligned_prompt(row)
                    if prompt is None:
                        skipped += 1
                    else:
                        prompts.append(prompt)
        except LMTPError:
            raise
        except (ValueError, KeyError, OSError, DatasetsError) as error:
            raise LMTPError(
                f"dataset {', '.join(names)} cannot be read from `{dataset_dir}`: {first_line(error)}."
            ) from error
    return prompts, skipped


def _aligned_prompt(row: dict[str, Any]) -> Prompt | None:
    if row["_tools"] or row["_images"] or row["_videos"] or row["_audios"]:
        return None
    messages = [{"role": message["role"], "content": message["content"]} for message in row["_prompt"]]
    if row["_system"]:
        messages.insert(0, {"role": "system", "content": row["_system"]})
    try:
        return Prompt(tuple(_messages(messages)))
    except _Malformed:
        return None
