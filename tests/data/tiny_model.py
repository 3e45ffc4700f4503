"""A tiny Llama with a tokenizer of its own: random weights, a default system text, several end tokens."""

import argparse

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
    """Save the model. Every twentieth token ends its turn, so that some answers stop and some do not."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # on a busy machine, waiting for a second core takes far longer than these matrices
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
    # penalties and top-k as many a model card has them: distillation must not let them in
    model.generation_config = GenerationConfig(
        bos_token_id=1,
        eos_token_id=[2, *range(40, len(tokenizer), 20)],
        do_sample=True,
        repetition_penalty=1.5,
        temperature=0.6,
        top_k=3,
    )
    model.save_pretrained(directory)


def parse(*arguments):
    """The namespace of a `distill` command line."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])
