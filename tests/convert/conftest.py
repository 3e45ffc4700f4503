"""A tiny base model, token sequences that can be foretold, and heads that foretell them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LeapHeads, LMTPConfig


FIRST_TOKEN, TOKENS = 40, 60  # the part of the vocabulary that the sequences walk through
ROWS, ROW_LENGTH, PROMPT = 12, 80, 8


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The base model's directory; without training, its hidden states tell which token was read."""
    return tiny_models.save_llama(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def base_model(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture(scope="session")
def sequences() -> list[list[int]]:
    """A walk through TOKENS tokens that goes on to the next in 85 of 100 steps and jumps anywhere in the others."""
    generator = torch.Generator().manual_seed(0)
    jumps = torch.rand(ROWS, ROW_LENGTH, generator=generator) < 0.15
    steps = torch.where(jumps, torch.randint(TOKENS, (ROWS, ROW_LENGTH), generator=generator), 1)
    return (FIRST_TOKEN + steps.cumsum(-1) % TOKENS).tolist()


@pytest.fixture(scope="session")
def rows_file(sequences, tmp_path_factory) -> Path:
    """The same as rows of lmtp-cli distill."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    written = [" ".join(map(str, ids)) for row in sequences for ids in (row[:PROMPT], row[PROMPT:])]
    lines = [json.dumps({"prompt_ids": p, "output_ids": o}) for p, o in zip(written[::2], written[1::2])]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def fitted(base_model, sequences):
    """A function that makes heads for the offsets given, right wherever the walk does not jump on the way."""

    def fit(offsets: Sequence[int], ids: Iterable[Sequence[int]] = sequences, layers: int = 1) -> LeapHeads:
        vocab_size, hidden_size = base_model.lm_head.weight.shape
        torch.manual_seed(len(offsets))
        heads = LeapHeads(LMTPConfig(len(offsets), head_layers=layers, hidden_size=hidden_size, vocab_size=vocab_size))
        batch = torch.tensor(list(ids))
        with torch.no_grad():
            states = base_model.model(batch).last_hidden_state
            for head, offset in zip(heads.heads, offsets):
                for parameter in head.blocks.parameters():
                    torch.nn.init.normal_(parameter, std=0.1)
                # The row of a token: the mean direction of the states `offset` tokens before it.
                features, targets = states[:, :-offset].flatten(0, 1), batch[:, offset:].flatten()
                for block in head.blocks:
                    features = block(features)
                middle = features.mean(0)
                sums = torch.zeros(vocab_size, hidden_size).index_add_(0, targets, features - middle)
                sums -= (sums @ middle)[:, None] * middle / (middle @ middle)
                head.unembed.weight.copy_(torch.nn.functional.normalize(sums, dim=-1))
        return heads

    return fit
