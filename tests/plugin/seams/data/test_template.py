"""LLaMA-Factory's loader trains on the tokens that the model read and wrote."""

import json

import pytest
from helpers.distillation import SYSTEM, build_tokenizer, distill, read_rows, save_prompts

from lmtp_factory.distill.dataset import write_dataset
from lmtp_factory.distill.rows import format_ids, parse_ids
from lmtp_factory.errors import LMTPError


IGNORE = -100


def load(model, directory, name, tmp_path, **options):
    """LLaMA-Factory's tokenized training set, and its tokenizer."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    model_args, data_args, training_args, _, _ = get_train_args(
        {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": str(model),
            "dataset": name,
            "dataset_dir": str(directory),
            "template": "lmtp",
            "cutoff_len": 512,
            "overwrite_cache": True,
            "output_dir": str(tmp_path / "unused"),
            "report_to": "none",
            **options,
        }
    )
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    module = get_dataset(template, model_args, data_args, training_args, stage="sft", tokenizer=tokenizer)
    return module["train_dataset"], tokenizer


def assert_same_tokens(examples, rows):
    assert len(examples) == len(rows) > 0
    for example, row in zip(examples, rows, strict=True):
        prompt, output = parse_ids(row["prompt_ids"]), parse_ids(row["output_ids"])
        assert example["input_ids"] == prompt + output
        assert example["labels"] == [IGNORE] * len(prompt) + output


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def distilled(distill_model, tmp_path_factory):
    """Rows sampled from the tiny model, and their directory."""
    directory = tmp_path_factory.mktemp("distilled")
    save_prompts(directory / "prompts.jsonl")
    options = ["--max-new-tokens", 24, "--temperature", 1, "--keep-truncated", "--name", "own"]
    distill(distill_model, "--prompts", directory / "prompts.jsonl", "--output-dir", directory, *options)
    return directory, read_rows(directory / "own.jsonl")


def test_training_tokens_equal_the_rows_tokens(distill_model, distilled, tmp_path, tokenizer):
    directory, rows = distilled
    examples, loaded = load(distill_model, directory, "own", tmp_path)
    assert_same_tokens(examples, rows)

    # the rows have a default system text, both finish reasons, and text that tokenizes to other ids
    assert all(SYSTEM in tokenizer.decode(parse_ids(row["prompt_ids"])) for row in rows)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    output = [parse_ids(row["output_ids"]) for row in rows]
    assert any(tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] != ids for ids in output)
    # training saves the model's own tokenizer; only a padding token is added
    assert loaded.eos_token == tokenizer.eos_token
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.pad_token is not None
    assert len(loaded) == len(tokenizer)


def test_an_end_of_turn_is_kept_and_none_is_added(distill_model, distilled, tmp_path):
    directory, rows = distilled
    examples, loaded = load(distill_model, directory, "own", tmp_path)
    for example, row in zip(examples, rows, strict=True):
        ends = [2, *range(40, len(loaded), 20)]
        assert (example["labels"][-1] in ends) == (row["finish_reason"] == "stop")
        assert not set(example["labels"][:-1]) & set(ends)


def test_packed_documents_are_whole(distill_model, distilled, tmp_path):
    directory, rows = distilled
    examples, _ = load(distill_model, directory, "own", tmp_path, packing=True, neat_packing=True, cutoff_len=256)
    found = set()
    for example in examples:
        documents = {}
        for token, document in zip(example["input_ids"], example["attention_mask"], strict=True):
            documents.setdefault(document, []).append(token)
        found |= {format_ids(ids) for document, ids in documents.items() if document != 0}
    assert found == {f"{row['prompt_ids']} {row['output_ids']}" for row in rows}


@pytest.mark.slow
def test_tokens_of_a_real_model(smollm2, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["What is 12345 + 678?", "Name two colours.", "Say 'naïve' in Japanese: 日本語."]))
    options = ["--max-new-tokens", 64, "--keep-truncated", "--name", "real", "--output-dir", tmp_path]
    distill(smollm2, "--prompts", prompts, *options)
    rows = read_rows(tmp_path / "real.jsonl")
    examples, _ = load(smollm2, tmp_path, "real", tmp_path)
    assert_same_tokens(examples, rows)
    assert any(row["finish_reason"] == "stop" and row["output_ids"].endswith(" 2") for row in rows)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt_ids": "How are you?", "output_ids": "5 2"}, {}, "template: qwen"),
        ({"prompt_ids": "5 6", "output_ids": "Fine."}, {}, "template: qwen"),
        ({"prompt_ids": "5 999999", "output_ids": "5 2"}, {}, "999999"),
        ({"prompt_ids": "5 6", "output_ids": "5 2"}, {"default_system": "Be brief."}, "default_system"),
    ],
)
def test_rows_that_are_not_ids_are_refused(distill_model, tmp_path, row, options, message):
    write_dataset(tmp_path, "wrong", [row])
    with pytest.raises(LMTPError, match=message):
        load(distill_model, tmp_path, "wrong", tmp_path, **options)
