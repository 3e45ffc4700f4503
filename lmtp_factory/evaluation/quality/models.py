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
    from transformers import PreTrainedTokenizerBase

_CONCURRENT = 32  # requests to a server
_TIMEOUT = 3600  # seconds for one request
_DEFAULT_CONTEXT = 2048  # what lm_eval assumes of a model that does not say how much it reads


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

    Raises:
        LMTPError: It cannot be loaded.
    """
    import torch
    from lm_eval.api.registry import get_model
    from safetensors import SafetensorError

    from ...distill.plain_generation import plain_config

    has_gpu = torch.cuda.is_available()
    try:
        model = get_model("hf")(
            pretrained=path,
            device="cuda" if has_gpu else "cpu",
            dtype="auto" if has_gpu else "float32",
            batch_size=batch_size,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise LMTPError(f"{path} cannot be loaded ({first_line(error)}): name an export or a hub id.") from error
    model.model.generation_config = plain_config(model.model.generation_config)
    return model


def check_lengths(path: str, problems: Mapping[Benchmark, Sequence[Row]], max_new_tokens: int) -> None:
    """Check that prompt and answer fit a model, before it loads: lm_eval would cut the beginning of a prompt that does not.

    Args:
        path: Directory or hub id of an export.
        problems: Rows of each benchmark.
        max_new_tokens: Longest answer, in tokens.

    Raises:
        LMTPError: One does not fit, or the model has no configuration.
    """
    tokenizer = load_tokenizer(path)
    longest = _context(path, tokenizer)
    for benchmark, rows in problems.items():
        for row in rows:
            tokens = _tokens(tokenizer, benchmark.prompt(row))
            room = longest - tokens
            if room <= 0:
                raise LMTPError(
                    f"The prompt of {row['id']} has {tokens} tokens, but the model reads {longest}: leave "
                    f"{benchmark.name} out of --tasks."
                )
            if room < max_new_tokens:
                raise LMTPError(
                    f"The prompt of {row['id']} has {tokens} tokens, and the model reads {longest}: write "
                    f"--max-new-tokens {room} or less."
                )


def _context(path: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a model reads, as lm_eval decides it."""
    from transformers import AutoConfig
    from transformers.tokenization_utils_base import LARGE_INTEGER

    try:
        config = AutoConfig.from_pretrained(path).get_text_config()
    except (OSError, ValueError) as error:
        raise LMTPError(f"{path} cannot be loaded ({first_line(error)}): name an export or a hub id.") from error
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (length := getattr(config, name, None)) is not None:
            return int(length)
    return tokenizer.model_max_length if tokenizer.model_max_length < LARGE_INTEGER else _DEFAULT_CONTEXT


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Return the number of tokens of a user's message in the chat template, as lm_eval makes them of its text."""
    conversation = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return len(tokenizer.encode(text, add_special_tokens=not begins))


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
