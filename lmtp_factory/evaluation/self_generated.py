"""Self-generated text. Acceptance is measured on the model's own greedy answers, which is what decoding produces."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..decoding.tree_config import TreeConfig
from ..distill.chat import load_tokenizer, prompt_ids
from ..distill.plain_generation import plain_generation
from ..distill.prompts import prompts_from_file
from .scoring import Row


def read_prompts(model_path: str, file: str, limit: int | None) -> tuple[PreTrainedTokenizerBase, list[list[int]]]:
    """Load a model's tokenizer and tokenize the first `limit` prompts of a file with its chat template.

    Args:
        model_path: Directory or hub id of a model with heads.
        file: JSON or JSONL file of prompts.
        limit: Number of prompts; None for all.

    Raises:
        LMTPError: There is no tokenizer, or a prompt is malformed.
    """
    prompts = prompts_from_file(file)[:limit]
    tokenizer = load_tokenizer(model_path)
    return tokenizer, [list(prompt_ids(tokenizer, prompt)) for prompt in prompts]


def generate_greedy(model: nn.Module, ids: Sequence[int], max_new_tokens: int, **kwargs) -> torch.Tensor:
    """Generate greedily, whatever the model's generation config asks for: of it, only the token ids are kept.

    Args:
        model: A model with leap heads.
        ids: Token ids of the prompt.
        max_new_tokens: Largest number of tokens of the answer.
        kwargs: Passed to `model.generate`.

    Returns:
        (1, length) token ids of the prompt and the answer.
    """
    return generate_greedy_batch(model, [ids], max_new_tokens, **kwargs)


def generate_greedy_batch(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, **kwargs
) -> torch.Tensor:
    """Generate answers to several prompts at once, see `generate_greedy`.

    Returns:
        (batch, length) token ids of the prompts, padded with 0 on the left to the longest, and of the answers.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=model.device)
    mask = (torch.arange(longest, device=model.device) >= longest - lengths).long()  # (batch, longest)
    with plain_generation(model):
        return model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, **kwargs)


def self_generated_rows(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[Row]:
    """Yield the token ids of each prompt and of the model's greedy answer."""
    for ids in tqdm(prompts, desc="the model writes", unit="answer"):
        answer = generate_greedy(model, ids, max_new_tokens, lmtp_tree=TreeConfig("chain", 1))
        yield list(ids), answer[0, len(ids) :].tolist()
