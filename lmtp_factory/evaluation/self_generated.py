"""A model's own greedy text: what acceptance is measured on, because it is what decoding writes."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..decoding.tree_config import TreeConfig
from ..distill.chat import load_tokenizer, prompt_ids
from ..distill.prompts import prompts_from_file
from .scoring import Row


def read_prompts(model_path: str, file: str, limit: int | None) -> tuple[PreTrainedTokenizerBase, list[list[int]]]:
    """The tokenizer of a model with heads, and the first `limit` prompts of a file as its chat template writes them.

    Raises:
        LMTPError: no tokenizer, or a malformed prompt; the sentence names the line.
    """
    prompts = prompts_from_file(file)[:limit]
    tokenizer = load_tokenizer(model_path)
    return tokenizer, [list(prompt_ids(tokenizer, prompt)) for prompt in prompts]


def generate_greedy(model: nn.Module, ids: Sequence[int], max_new_tokens: int, **kwargs) -> torch.Tensor:
    """(1, length) prompt and greedy answer; processors that the model's generation config asks for are left out."""
    prompt = torch.tensor([ids], device=model.device)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0}
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=max_new_tokens, **greedy, **kwargs)


def write_own_text(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[Row]:
    """Each prompt and the model's greedy answer to it."""
    for ids in tqdm(prompts, desc="the model writes", unit="answer"):
        answer = generate_greedy(model, ids, max_new_tokens, lmtp_tree=TreeConfig("chain", 1))
        yield list(ids), answer[0, len(ids) :].tolist()
