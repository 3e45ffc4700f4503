"""A tokenizer, texts and a dataset for tiny models."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


MAX_VOCAB_SIZE = 400
DATASET = "tiny"

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# The words that LLaMA-Factory's templates for these models write: in the vocabulary from the start, so that no
# template has to add tokens that the embedding has no row for.
TEMPLATE_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>",  # qwen
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",  # llama3
    "<start_of_turn>", "<end_of_turn>",  # gemma, gemma3
    "<start_of_image>", "<end_of_image>", "<image_soft_token>",  # gemma3's images
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Twelve facts that repeat, so that a few steps can teach something.
SUBJECTS = ("a frog", "the grey cat", "one small dog", "the river")
VERBS = ("leaps over", "looks at", "walks around")
OBJECTS = ("the old stone", "a green leaf", "the long wooden fence", "seven tiny tokens")


def texts(rows: int = 48) -> list[tuple[str, str]]:
    """``rows`` pairs of a question and its answer; answers are some 10 to 25 tokens long."""
    pairs = []
    for row in range(rows):
        subject, verb = SUBJECTS[row % len(SUBJECTS)], VERBS[row % len(VERBS)]
        thing = OBJECTS[(row // 3) % len(OBJECTS)]
        answer = f"{subject} {verb} {thing}, and then {subject} {verb} {thing} again."
        pairs.append((f"what does {subject} do?", answer))
    return pairs


def train_bpe(text: Sequence[str], special_tokens: Sequence[str]) -> Tokenizer:
    """A byte-level BPE that encodes any text; the special tokens take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Some 350 tokens, with a chat template and Gemma 3's image tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe([" ".join(pair) for pair in texts()], [PAD, EOS, BOS, *TEMPLATE_TOKENS]),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )


def save_dataset(directory: str | Path, rows: int = 48) -> str:
    """Write ``tiny.json`` (alpaca rows) and its ``dataset_info.json``; the name to put into ``dataset``."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    content = [{"instruction": question, "input": "", "output": answer} for question, answer in texts(rows)]
    (directory / f"{DATASET}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    info = {DATASET: {"file_name": f"{DATASET}.json"}}
    (directory / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    return DATASET


def batch(rows: int = 2, length: int = 19, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random `input_ids`, `attention_mask` and partly masked `labels`, (rows, length) each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 200, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def save_token_rows(path: Path) -> Path:
    """Three rows of random token ids as `lmtp-cli distill` writes them, one with an answer of two tokens."""
    generator = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for prompt, output in ((3, 9), (5, 2), (4, 14)):
            ids = torch.randint(20, 200, (prompt + output,), generator=generator).tolist()
            row = {"prompt_ids": " ".join(map(str, ids[:prompt])), "output_ids": " ".join(map(str, ids[prompt:]))}
            file.write(json.dumps(row) + "\n")
    return path
