"""A tiny model to distill from, whose chat template has a default system text, and the command that does it."""

import argparse
import json
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerFast

from helpers import tiny_data, tiny_models
from lmtp_factory.cli import distill as cli


SYSTEM = "You are a tiny model."
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
) + tiny_data.CHAT_TEMPLATE
# Whatever the model learns to say, its tokenizer has seen these words.
TEXT = f"user system assistant {SYSTEM} how are you today? tell me about leaps, tokens and heads. " * 3


def build_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_data.train_bpe([TEXT], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_model(directory: str | Path) -> None:
    """Save model and tokenizer. Every twentieth token ends a turn, so some answers stop and some are cut."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    model = tiny_models.llama(vocab_size=len(tokenizer), initializer_range=0.3, **special)
    # Many models ship penalties and top-k; distillation must not apply them.
    model.generation_config = GenerationConfig(
        bos_token_id=1,
        eos_token_id=[2, *range(40, len(tokenizer), 20)],
        do_sample=True,
        repetition_penalty=1.5,
        temperature=0.6,
        top_k=3,
    )
    model.save_pretrained(directory)


def save_prompts(path: Path) -> None:
    """Save fourteen different prompts as JSONL."""
    prompts = [f"tell me about {'the head and ' * (number % 5)}token {number}" for number in range(14)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")


def distill(*arguments) -> None:
    """Run ``lmtp-cli distill`` and raise what it raises."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert cli.run(parser.parse_args([str(argument) for argument in arguments])) == 0


def read_rows(path: Path) -> list[dict]:
    """The rows of a dataset, or of a journal after its header line."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "id" in row]
