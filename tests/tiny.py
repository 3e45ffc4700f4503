"""Tiny random models, a tokenizer and a dataset: what tests train on instead of downloads.

Every ``tiny_<architecture>(directory)`` writes a whole model directory (weights, config, tokenizer) that
``from_pretrained`` and LLaMA-Factory load, and returns its path. Seeds are fixed, so two calls give equal files.
Architectural keyword arguments override the config's, e.g. ``tiny_llama(directory, hidden_size=64)``.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


SEED = 0
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


def tiny_texts(rows: int = 48) -> list[tuple[str, str]]:
    """``rows`` pairs of a question and its answer; answers are some 10 to 25 tokens long."""
    texts = []
    for row in range(rows):
        subject, verb = SUBJECTS[row % len(SUBJECTS)], VERBS[row % len(VERBS)]
        thing = OBJECTS[(row // 3) % len(OBJECTS)]
        answer = f"{subject} {verb} {thing}, and then {subject} {verb} {thing} again."
        texts.append((f"what does {subject} do?", answer))
    return texts


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 350 tokens that encodes any text, with a chat template and Gemma 3's image tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        special_tokens=[PAD, EOS, BOS, *TEMPLATE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(pair) for pair in tiny_texts()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
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


def tiny_llama(directory: str | Path, tie: bool = False, **config) -> Path:
    """Llama: untied like 3.1-8B, or with ``tie`` like 3.2-3B."""
    return _save(LlamaForCausalLM, LlamaConfig, directory, tie_word_embeddings=tie, **config)


def tiny_mistral(directory: str | Path, tie: bool = False, **config) -> Path:
    """Mistral with a sliding window shorter than the training sequences."""
    config = {"sliding_window": 16} | config
    return _save(MistralForCausalLM, MistralConfig, directory, tie_word_embeddings=tie, **config)


def tiny_qwen2(directory: str | Path, tie: bool = False, **config) -> Path:
    """Qwen2 and Qwen2.5: untied like 7B, or with ``tie`` like 3B."""
    return _save(Qwen2ForCausalLM, Qwen2Config, directory, tie_word_embeddings=tie, **config)


def tiny_qwen3(directory: str | Path, tie: bool = True, **config) -> Path:
    """Qwen3."""
    config = {"head_dim": 8} | config
    return _save(Qwen3ForCausalLM, Qwen3Config, directory, tie_word_embeddings=tie, **config)


def tiny_mixtral(directory: str | Path, **config) -> Path:
    """Mixtral: four experts, two of them a token."""
    config = {"num_local_experts": 4, "num_experts_per_tok": 2} | config
    return _save(MixtralForCausalLM, MixtralConfig, directory, tie_word_embeddings=False, **config)


def tiny_qwen3_moe(directory: str | Path, **config) -> Path:
    """Qwen3's mixture of experts: four experts, two of them a token."""
    config = {"head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2} | config
    return _save(Qwen3MoeForCausalLM, Qwen3MoeConfig, directory, tie_word_embeddings=False, **config)


def tiny_gemma3_text(directory: str | Path, **config) -> Path:
    """Gemma 3's language model alone, the class of the 1B; tied, as all Gemmas."""
    return _save(Gemma3ForCausalLM, Gemma3TextConfig, directory, **_GEMMA3_TEXT | config)


def tiny_gemma3(directory: str | Path, **text_config) -> Path:
    """Gemma 3 with its vision tower and processor, the class of 4B and 12B; ``text_config`` overrides the text part."""
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    tokenizer = tiny_tokenizer()
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**_shape(tokenizer) | _GEMMA3_TEXT | text_config),
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids(tokenizer.boi_token),
        eoi_token_index=tokenizer.convert_tokens_to_ids(tokenizer.eoi_token),
        image_token_index=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = Gemma3ForConditionalGeneration(config)
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
        image_seq_length=4,
    )
    return _write(directory, model, processor)


def tiny_dataset(directory: str | Path, rows: int = 48) -> str:
    """Write ``tiny.json`` (alpaca rows) and its ``dataset_info.json``; the name to put into ``dataset``."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    content = [{"instruction": question, "input": "", "output": answer} for question, answer in tiny_texts(rows)]
    (directory / f"{DATASET}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    info = {DATASET: {"file_name": f"{DATASET}.json"}}
    (directory / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    return DATASET


_GEMMA3_TEXT = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "tie_word_embeddings": True,
                "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip


def _shape(tokenizer: PreTrainedTokenizerFast) -> dict:
    """What all architectures share: two layers of width 32."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save(model_class: type[PreTrainedModel], config_class: type, directory: str | Path, **config) -> Path:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(SEED)
    return _write(directory, model_class(config_class(**_shape(tokenizer) | config)), tokenizer)


def _write(directory: str | Path, model: PreTrainedModel, processor_or_tokenizer) -> Path:
    model.save_pretrained(directory)
    processor_or_tokenizer.save_pretrained(directory)
    return Path(directory)
