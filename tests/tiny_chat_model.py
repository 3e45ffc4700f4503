"""A tiny random Llama with chat template, default system text and several end tokens, and how to distill from it."""

import argparse
import json

from lmtp_factory.cli import distill as cli


SYSTEM = "You are a tiny model."
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = f"user system assistant {SYSTEM} how are you today? tell me about leaps, tokens and heads. " * 3
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_model(directory):
    """Save model and tokenizer. Every twentieth token ends a turn, so some answers stop and some are cut."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # a second thread costs more than it saves on such small matrices
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    # many models ship penalties and top-k; distillation must not apply them
    model.generation_config = GenerationConfig(
        bos_token_id=1,
        eos_token_id=[2, *range(40, len(tokenizer), 20)],
        do_sample=True,
        repetition_penalty=1.5,
        temperature=0.6,
        top_k=3,
    )
    model.save_pretrained(directory)


def save_prompts(path):
    """Save fourteen different prompts as JSONL."""
    prompts = [f"tell me about {'the head and ' * (number % 5)}token {number}" for number in range(14)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")


def distill(*arguments):
    """Run `lmtp-cli distill` and raise what it raises."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert cli.run(parser.parse_args([str(argument) for argument in arguments])) == 0


def read_rows(path):
    """The rows of a dataset, or of a journal after its header line."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "id" in row]
