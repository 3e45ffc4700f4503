"""Decoding with adapters, in several threads, inside itself, under autocast and inference mode."""

import copy
import threading

import torch
from helpers.decoding import (
    GREEDY,
    TREES,
    assert_as_stock,
    assert_as_stock_with_drafts,
    assert_left_to_stock,
    decoded,
    enlarge_weights,
    padded,
    prompt,
    stock,
)
from helpers.tiny_models import randomise_heads
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
)

from lmtp_factory import attach_heads
from lmtp_factory.decoding.stats import DecodeStats


def adapted(leap, tmp_path, config):
    from helpers import tiny_models

    model = AutoModelForCausalLM.from_pretrained(tiny_models.save_llama(tmp_path))
    enlarge_weights(model)
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    attach_heads(model)
    randomise_heads(model)
    return model.eval()


def test_heads_beside_an_unmerged_adapter(leap, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = adapted(leap, tmp_path, config)
    output, stats = assert_as_stock_with_drafts(model, {"input_ids": prompt()})
    assert stats.tau > 1.3
    with model.disable_adapter():
        without, _ = assert_as_stock(model, input_ids=prompt(), max_new_tokens=24, **GREEDY)
    assert without.tolist() != output.tolist()


def test_prompt_tuning_falls_back(leap, tmp_path, caplog):
    model = adapted(leap, tmp_path, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    reason = "its inputs are prepared by another library, as in prompt tuning"
    assert_left_to_stock(model, reason, caplog, input_ids=prompt(), max_new_tokens=8, **GREEDY)


def test_threads_with_different_requests(leap):
    model, outputs = leap(), {}
    expected = [stock(model, prompt(seed=seed), max_new_tokens=24, **GREEDY) for seed in range(4)]

    def work(seed):
        stats = DecodeStats()
        decode = ("auto", "off", "forward", "backward")[seed]
        kwargs = {"lmtp_decode": decode, "lmtp_stats": stats, "max_new_tokens": 24} | GREEDY
        outputs[seed] = model.generate(prompt(seed=seed), **kwargs), stats.strategy

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outputs[seed][1] for seed in range(4)] == ["backward", "off", "forward", "backward"]
    assert all(torch.equal(outputs[seed][0], expected[seed]) for seed in range(4))


def test_the_first_calls_of_a_model_may_come_from_several_threads(leap):
    """They prove at once that it takes trees, and one of them fails in the middle."""
    model, outputs, together = copy.deepcopy(leap("mistral")), {}, threading.Barrier(6)
    model.__dict__.pop("_takes_trees", None)
    kwargs = {"max_new_tokens": 24} | GREEDY
    inputs = [padded([9, 3, 5][: 1 + seed % 3], seed) for seed in range(6)]
    expected = [stock(leap("mistral"), **batch, **kwargs) for batch in inputs]

    def fail(input_ids, scores, **kwargs):
        if input_ids.shape[1] == 14:
            raise RuntimeError("out of patience")
        return torch.zeros(1, dtype=torch.bool)

    def work(seed):
        together.wait()
        stats, plan = DecodeStats(), list(TREES.values())[seed % len(TREES)]
        criteria = [fail] if seed == 3 else []
        try:
            output = model.generate(
                **inputs[seed], lmtp_stats=stats, lmtp_tree=plan, stopping_criteria=criteria, **kwargs
            )
            outputs[seed] = output.tolist(), stats.strategy, stats.tokens
        except RuntimeError as error:
            outputs[seed] = str(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs.pop(3) == "out of patience"
    assert outputs == {
        seed: (expected[seed].tolist(), "backward", 24 * len(expected[seed])) for seed in range(6) if seed != 3
    }
    assert_as_stock(model, prompt(), **kwargs)


def test_a_criterion_that_generates_itself(leap):
    """Each call has its own wishes, the inner one too."""
    model, inner = leap(), DecodeStats()
    answer = stock(model, prompt(seed=1), max_new_tokens=5, **GREEDY)

    def ask(input_ids, scores, **kwargs):
        model.generate(prompt(seed=1), max_new_tokens=5, lmtp_stats=inner, lmtp_decode="forward", **GREEDY)
        return torch.zeros(1, dtype=torch.bool)

    expected = stock(model, prompt(), max_new_tokens=6, **GREEDY)
    ours, stats = decoded(model, prompt(), max_new_tokens=6, stopping_criteria=[ask], **GREEDY)
    assert torch.equal(ours, expected) and torch.equal(stock(model, prompt(seed=1), max_new_tokens=5, **GREEDY), answer)
    assert (stats.strategy, stats.rows, inner.strategy, inner.rows) == ("backward", 1, "forward", 6)


def test_autocast_and_inference_mode(leap):
    kwargs = {"max_new_tokens": 8} | GREEDY
    with torch.inference_mode():
        assert_as_stock(leap(), prompt(), **kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # near ties may differ
        assert decoded(leap(), prompt(), **kwargs)[1].tokens == 8
    assert_as_stock(leap(), prompt(), **kwargs)
