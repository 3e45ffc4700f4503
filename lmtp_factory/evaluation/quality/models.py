"""Models for lm-evaluation-harness: exports in this process, and models behind an OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...distill.chat import load_tokenizer
from ...errors import LMTPError, first_line
from ...files import HEADS_FOLDER
from .benchmarks import Benchmark, Row


if TYPE_CHECKING:
    from lm_eval.api.model import LM

_CONCURRENT = 32  # requests to a server
_TIMEOUT = 3600  # seconds for one request


def check_export(path: str) -> None:
    """Check that a path or hub id is a whole model with a chat template, before any model loads.

    Heads in `lmtp/` are allowed: transformers does not read them.

    Raises:
        LMTPError: It is not.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            what = "is an adapter"
        else:
            what = "holds heads alone" if (folder / HEADS_FOLDER).is_dir() else "holds no model"
        raise LMTPError(f"{path} {what}: write an export with llamafactory-cli export, and name its directory.")
    if not load_tokenizer(path).chat_template:
        raise LMTPError(
            f"The tokenizer of {path} has no chat template, which the prompts need: name an instruct model."
        )


def load_export(path: str, batch_size: int) -> LM:
    """Load an export as lm_eval's `hf` model: in fp32 on a CPU, where bf16 is slow, else as saved on a GPU.

    Whatever its generation_config.json asks for (sampling, penalties) is left out; the tokens that end an answer stay.
    """
    import torch
    from lm_eval.api.registry import get_model
    from transformers import GenerationConfig

    has_gpu = torch.cuda.is_available()
    model = get_model("hf")(
        pretrained=path,
        device="cuda" if has_gpu else "cpu",
        dtype="auto" if has_gpu else "float32",
        batch_size=batch_size,
    )
    saved = model.model.generation_config
    tokens = {name: getattr(saved, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.model.generation_config = GenerationConfig(**tokens)
    return model


def check_lengths(model: LM, problems: Mapping[Benchmark, Sequence[Row]], max_new_tokens: int) -> None:
    """Check that prompt and answer fit the model: lm_eval would cut the beginning of a prompt that does not.

    Args:
        model: A model from `load_export`.
        problems: Rows of each benchmark.
        max_new_tokens: Longest answer, in tokens.

    Raises:
        LMTPError: One does not fit.
    """
    for benchmark, rows in problems.items():
        for row in rows:
            text = model.apply_chat_template([{"role": "user", "content": benchmark.prompt(row)}])
            tokens = len(model.tok_encode(text))
            room = model.max_length - tokens
            if room <= 0:
                raise LMTPError(
                    f"The prompt of {row['id']} has {tokens} tokens, but the model reads {model.max_length}: leave "
                    f"{benchmark.name} out of --tasks."
                )
            if room < max_new_tokens:
                raise LMTPError(
                    f"The prompt of {row['id']} has {tokens} tokens, and the model reads {model.max_length}: write "
                    f"--max-new-tokens {room} or less."
                )


def check_served(base_url: str, model: str) -> None:
    """Check that a server serves a model under its name.

    Raises:
        LMTPError: It does not answer, or does not know the name.
    """
    import openai

    try:
        client = openai.OpenAI(base_url=base_url, api_key=_api_key(), timeout=20.0, max_retries=1)
        served = [listed.id for listed in client.models.list()]
    except openai.OpenAIError as error:
        raise LMTPError(
            f"No OpenAI-compatible server answers at {base_url} ({first_line(error.__cause__ or error)}): start it, or "
            "correct --base-url, which ends in /v1."
        ) from error
    if model not in served:
        raise LMTPError(
            f"The server at {base_url} serves {', '.join(served) or 'no model'}, but not {model}: start it with "
            f"--served-model-name {model}, or name what it serves as LABEL=NAME."
        )


def server_model(base_url: str, name: str) -> LM:
    """Return lm_eval's `local-chat-completions` for a model on a server, which applies the chat template itself."""
    from lm_eval.api.registry import get_model

    return get_model("local-chat-completions")(
        model=name,
        base_url=f"{base_url.rstrip('/')}/chat/completions",
        num_concurrent=_CONCURRENT,
        timeout=_TIMEOUT,
        header={"Authorization": f"Bearer {_api_key()}"},
    )


def _api_key() -> str:
    # The client requires a key; local servers ignore it.
    return os.environ.get("OPENAI_API_KEY") or "none"
