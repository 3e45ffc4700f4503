"""Generation with transformers: the model's own tokens, whatever the batch."""

import re

import pytest
import torch
from helpers.distillation import SYSTEM, distill, read_rows

from lmtp_factory.distill.engine import Request, Sampling
from lmtp_factory.distill.hf_engine import HFEngine, group_batches
from lmtp_factory.distill.rows import parse_ids
from lmtp_factory.errors import LMTPError


def test_batches_hold_every_request_once_and_fit():
    requests = [Request(number, tuple(range(1 + number * 7 % 23))) for number in range(50)]
    options = {"max_new_tokens": 10, "batch_size": None, "token_budget": 100}
    batches = group_batches(requests, **options)
    assert sorted(request.id for batch in batches for request in batch) == list(range(50))
    for batch in batches:
        assert (max(len(request.prompt_ids) for request in batch) + 10) * len(batch) <= 100
    assert group_batches(requests[::-1], **options) == batches
    sizes = [len(batch) for batch in group_batches(requests, max_new_tokens=10, batch_size=24, token_budget=1)]
    assert sizes == [24, 24, 2]


def greedy(model, ids, stops, limit):
    """Greedy decoding without cache, batch and generate()."""
    ids, output = list(ids), []
    while len(output) < limit:
        with torch.inference_mode():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        output.append(token)
        if token in stops:
            break
    return output


def test_greedy_rows_are_the_models_own_tokens(distill_model, prompts_file, tmp_path, tokenizer):
    options = ["--name", "g", "--output-dir", tmp_path, "--max-new-tokens", 20, "--keep-truncated"]
    distill(distill_model, "--prompts", prompts_file, *options)
    rows = sorted(read_rows(tmp_path / "g.raw.jsonl"), key=lambda row: row["id"])
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(distill_model, dtype=torch.float32)
    stops = {2, *range(40, len(tokenizer), 20)}
    assert [row["id"] for row in rows] == list(range(14))
    for row in rows:
        prompt = parse_ids(row["prompt_ids"])
        text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{row['instruction']}<|im_end|>\n"
        assert tokenizer.decode(prompt) == text + "<|im_start|>assistant\n"
        assert parse_ids(row["output_ids"]) == greedy(model, prompt, stops, 20)
        assert row["output"] == tokenizer.decode(parse_ids(row["output_ids"]), skip_special_tokens=True)
    kept = read_rows(tmp_path / "g.jsonl")
    assert kept and kept == [row for row in rows if row["id"] in {row["id"] for row in kept}]


def test_sampling_depends_only_on_the_seed(distill_model):
    engine = HFEngine(str(distill_model))
    requests = [Request(number, (1, 30 + number)) for number in range(14)]

    def outputs(seed):
        generations = []
        sampling = Sampling(8, temperature=1.0, seed=seed, stop_ids=(2,))
        engine.generate(requests, sampling, done=(), on_finished=generations.extend)
        return [generation.output_ids for generation in generations]

    torch.manual_seed(1)
    first = outputs(3)
    torch.manual_seed(2)
    assert outputs(3) == first
    assert outputs(4) != first
    assert len(set(first)) > 10


def test_a_model_that_cannot_be_loaded(tmp_path):
    with pytest.raises(LMTPError, match="No causal language model can be loaded"):
        HFEngine(str(tmp_path))


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        (4, "no memory for 4 rows at once: run the same command again with --batch-size 2; finished rows are kept."),
        (1, "no memory for one row: write a smaller --max-new-tokens or --max-prompt-tokens, and another --name."),
    ],
)
def test_a_device_without_memory(rows, advice, distill_model, monkeypatch):
    engine = HFEngine(str(distill_model), batch_size=rows)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "_generate_batch", full)
    requests = [Request(number, (1, 2, 3), "text") for number in range(rows)]
    with pytest.raises(LMTPError, match=re.escape(advice)):
        engine.generate(requests, Sampling(4, 0.0, seed=0, stop_ids=(2,)), done=set(), on_finished=lambda rows: None)
