"""New tokens in stage 2: their names, a dataset that has them, and heads that have grown with the vocabulary."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from helpers import tiny_data
from lmtp_factory import LeapHeads
from lmtp_factory.modeling.checkpoint import load_heads, tokenizer_fingerprint


TOKENS = ("<think>", "<done>")
KEYS = {"add_tokens": ",".join(TOKENS)}
KNOWN, GROWN = 356, 384  # words of the tiny models, and upstream's multiple of 64 above
STAGE2 = {"stage": "lmtp2", "max_steps": 8, "val_size": 6, "eval_strategy": "steps", "eval_steps": 8}


def save_dataset(directory: Path) -> None:
    """Write the tiny dataset with both new tokens in every answer."""
    tiny_data.save_dataset(directory)
    path = directory / "tiny.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([row | {"output": f"<think>{row['output']}<done>"} for row in rows]))


def assert_grown(directory: Path) -> LeapHeads:
    """Assert that the heads in a directory know the new tokens, and return them."""
    heads, tokenizer = load_heads(directory), AutoTokenizer.from_pretrained(directory)
    assert heads.config.vocab_size == GROWN
    assert heads.config.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert tokenizer.convert_tokens_to_ids(list(TOKENS)) == [KNOWN, KNOWN + 1]
    assert all(head.unembed is None or head.unembed.weight.shape[0] == GROWN for head in heads.heads)
    return heads
