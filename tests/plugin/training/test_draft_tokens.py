"""The draft vocabulary that stage 1 counts on its training set."""

from collections import Counter

import pytest
from helpers import llamafactory_runs as runs
from helpers import tiny_data

from lmtp_factory import LMTPConfig, LMTPError
from lmtp_factory.modeling import load_heads
from lmtp_factory.plugin.training.draft_tokens import count_draft_tokens


def test_answers_are_counted_and_the_share_is_logged(llama, data, tmp_path, lines):
    runs.train(llama, data, tmp_path, draft_vocab_size=20, max_steps=1)
    tokenizer = tiny_data.build_tokenizer()
    counts = Counter(token for _, answer in tiny_data.texts(48) for token in tokenizer(answer).input_ids)
    chosen = load_heads(tmp_path).draft_tokens.tolist()
    assert len(chosen) == 20
    assert {token for token, _ in counts.most_common(10)} <= set(chosen)
    assert any(line.startswith("The heads draft 20 of ") and "% of the training answers." in line for line in lines)


def test_stage_two_takes_the_vocabulary_of_its_heads(llama, data, tmp_path):
    runs.train(llama, data, tmp_path / "stage1", draft_vocab_size=20, max_steps=1)
    run = {"stage": "lmtp2", "finetuning_type": "lora", "stage1_pretrained_path": str(tmp_path / "stage1")}
    runs.train(llama, data, tmp_path / "stage2", max_steps=1, **run)
    first, second = (load_heads(tmp_path / name).draft_tokens for name in ("stage1", "stage2"))
    assert first.tolist() == second.tolist()
    with pytest.raises(LMTPError, match="draft_vocab_size 30, the heads have 20"):
        runs.train(llama, data, tmp_path / "other", max_steps=1, draft_vocab_size=30, **run)


def test_a_stream_is_refused(llama, data, tmp_path, no_model_loads):
    with pytest.raises(LMTPError, match="but a stream cannot be read beforehand: leave it out"):
        runs.train(
            llama,
            data,
            tmp_path,
            draft_vocab_size=20,
            streaming=True,
            preprocessing_num_workers=None,
            dataloader_num_workers=1,
        )


def test_without_a_training_set_there_is_nothing_to_count():
    with pytest.raises(LMTPError, match="but there is none: leave it out"):
        count_draft_tokens({"eval_dataset": []}, LMTPConfig(draft_vocab_size=20), 300)
