"""Both stages through upstream's own training function: what is trained, logged, saved and resumed."""

import json

import pytest
import torch
from helpers import llamafactory_runs as runs
from helpers import tiny_models
from safetensors.torch import load_file

from lmtp_factory import LMTPError
from lmtp_factory.modeling.checkpoint import load_heads, read_config


HEADS = ("loss_head_1", "loss_head_2", "loss_head_3", "acc_head_1", "acc_head_2", "acc_head_3")


def steps(entries):
    return [entry for entry in entries if "loss" in entry]


def test_stage_one_trains_and_writes_heads_only(llama, data, tmp_path):
    entries = runs.train(
        llama, data, tmp_path, max_steps=12, val_size=6, eval_strategy="steps", eval_steps=6, plot_loss=True
    )
    logged = steps(entries)
    assert len(logged) == 12
    assert logged[-1]["loss"] < logged[0]["loss"] - 1
    for entry in logged:
        assert entry["loss"] == pytest.approx(sum(entry[f"loss_head_{i}"] for i in (1, 2, 3)), rel=1e-4)
        assert all(0 <= entry[f"acc_head_{i}"] <= 1 for i in (1, 2, 3))
        assert "loss_head_0" not in entry
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert evaluations[0]["eval_loss"] == pytest.approx(sum(evaluations[0][f"eval_loss_head_{i}"] for i in (1, 2, 3)))
    for entry in evaluations:  # a chain of reach 7 has six drafts
        assert entry["eval_tau"] == pytest.approx(1 + sum(entry[f"eval_acceptance_{i}"] for i in range(1, 7)))
    assert evaluations[-1]["eval_tau"] > evaluations[0]["eval_tau"] > 1

    lines = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    assert all(set(HEADS) <= set(line) for line in lines if "loss" in line)
    assert any({"eval_loss_head_3", "eval_tau"} <= set(line) for line in lines)
    assert (tmp_path / "training_heads.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / "config.json").exists()
    config = read_config(tmp_path / "lmtp")
    assert (config.offsets, config.base_model) == ((1, 3, 5, 7), str(llama))
    assert config.tokenizer_fingerprint


def test_stage_one_leaves_the_backbone_alone(llama, data, tmp_path, trainers):
    runs.train(llama, data, tmp_path, head_kind="shared", leap_offsets="2,3,6", head_layers=2)
    heads = load_heads(tmp_path)
    assert heads.config.offsets == (1, 2, 3, 6)
    assert all(block.leap_proj.weight.abs().sum() > 0 for head in heads.heads for block in head.blocks)
    assert heads.heads[0].unembed is None
    trained = trainers[0].model.state_dict()
    for name, tensor in load_file(llama / "model.safetensors").items():
        assert torch.equal(trained[name], tensor), name


@pytest.mark.parametrize("method", ["full", "lora", "freeze"])
def test_stage_two_tunes_backbone_and_heads(method, llama, data, stage1, tmp_path):
    entries = runs.train(
        llama, data, tmp_path, stage="lmtp2", finetuning_type=method, stage1_pretrained_path=str(stage1),
        freeze_trainable_layers=1, max_steps=8, val_size=6, eval_strategy="steps", eval_steps=8, learning_rate=3e-3,
    )  # fmt: skip
    logged = steps(entries)
    assert logged[-1]["loss_head_0"] < logged[0]["loss_head_0"]
    for entry in logged:
        extra = sum(entry[f"loss_head_{i}"] for i in (1, 2, 3))
        assert entry["loss"] == pytest.approx(entry["loss_head_0"] + 0.1 * extra, rel=1e-4)
    assert any("eval_acc_head_0" in entry for entry in entries)
    old, new = load_heads(stage1).state_dict(), load_heads(tmp_path).state_dict()
    assert all(not torch.equal(old[name], new[name]) for name in old), "every tensor of the heads is tuned"
    if method == "lora":
        assert not any(
            "leap" in name or "lm_head" in name for name in load_file(tmp_path / "adapter_model.safetensors")
        )
    else:
        base, tuned = load_file(llama / "model.safetensors"), load_file(tmp_path / "model.safetensors")
        assert set(base) == set(tuned)
        assert any(not torch.equal(base[name], tuned[name]) for name in base)


def test_stage_two_starts_from_the_stage_one_heads(llama, data, stage1, tmp_path):
    trained = runs.train(
        llama, data, tmp_path / "a", stage="lmtp2", finetuning_type="lora", stage1_pretrained_path=str(stage1)
    )
    fresh = runs.train(llama, data, tmp_path / "b", stage="lmtp2", finetuning_type="lora")
    assert steps(trained)[0]["loss_head_1"] < steps(fresh)[0]["loss_head_1"] - 0.1
    assert steps(trained)[0]["loss_head_0"] == pytest.approx(steps(fresh)[0]["loss_head_0"], rel=1e-5)


def test_the_release_s_spelling_is_the_same_run(llama, data, tmp_path, lines):
    ours = runs.train(llama, data, tmp_path / "ours")
    theirs = runs.train(
        llama, data, tmp_path / "theirs", stage="sft", mtp_type="lmtp1", num_heads=3,
        stage1_pretrained_path=f"{tmp_path}/ours/../theirs/", save_only_model=False,
    )  # fmt: skip
    assert runs.step_losses(ours) == runs.step_losses(theirs)
    assert (
        f"stage1_pretrained_path {tmp_path}/ours/../theirs/ has no heads yet: stage 1 starts from fresh ones." in lines
    )


def test_plain_sft_is_left_alone(llama, data, tmp_path):
    entries = runs.train(llama, data, tmp_path, stage="sft", finetuning_type="lora")
    assert not any("head" in key for entry in entries for key in entry)
    assert not (tmp_path / "lmtp").exists()


ACCUMULATION = {"stage": "lmtp2", "finetuning_type": "full", "disable_shuffling": True, "max_steps": 3}


def test_accumulation_equals_a_large_batch(llama, data, tmp_path):
    """Answers differ in length, so a mean of micro-batch means would give other numbers."""
    large = runs.train(llama, data, tmp_path / "a", per_device_train_batch_size=8, **ACCUMULATION)
    small = runs.train(
        llama, data, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4, **ACCUMULATION
    )
    assert runs.step_losses(large) == pytest.approx(runs.step_losses(small), rel=1e-4)
    for a, b in zip(steps(large), steps(small)):
        assert a["loss_head_3"] == pytest.approx(b["loss_head_3"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_head_zero_is_plain_sft(llama, data, tmp_path):
    """With weightless heads, stage 2 is upstream's own SFT, step for step."""
    shared = {"finetuning_type": "full", "max_steps": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    sft = runs.train(llama, data, tmp_path / "sft", stage="sft", **shared)
    ours = runs.train(llama, data, tmp_path / "lmtp", stage="lmtp2", head_weight=0.0, **shared)
    assert runs.step_losses(ours) == pytest.approx(runs.step_losses(sft), rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "memory"),
    [("mixtral", {"disable_gradient_checkpointing": True}), ("qwen3_moe", {"use_reentrant_gc": False})],
)
def test_the_router_s_loss_is_plain_sft_s(architecture, memory, data, tmp_path):
    """With weightless heads, stage 2 of a mixture of experts is upstream's own SFT with its auxiliary loss."""
    model = getattr(tiny_models, f"save_{architecture}")(tmp_path / "model")
    run = {"finetuning_type": "full", "learning_rate": 1e-3, "gradient_accumulation_steps": 2, **memory}
    sft = runs.train(model, data, tmp_path / "sft", stage="sft", moe_aux_loss_coef=0.5, **run)
    ours = runs.train(model, data, tmp_path / "with", stage="lmtp2", head_weight=0.0, moe_aux_loss_coef=0.5, **run)
    without = runs.train(model, data, tmp_path / "without", stage="lmtp2", head_weight=0.0, **run)
    assert runs.step_losses(ours) == pytest.approx(runs.step_losses(sft), rel=1e-4)
    assert runs.step_losses(ours)[0] > runs.step_losses(without)[0] + 0.4
    router = next(name for name in load_file(tmp_path / "sft" / "model.safetensors") if "gate.weight" in name)
    trained = [load_file(tmp_path / name / "model.safetensors")[router] for name in ("sft", "with", "without")]
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(trained[1], trained[2], rtol=1e-2, atol=1e-3)


def test_neftune_is_plain_sft_s(llama, data, tmp_path):
    run = {"finetuning_type": "full", "learning_rate": 1e-3}
    sft = runs.train(llama, data, tmp_path / "sft", stage="sft", neftune_noise_alpha=20.0, **run)
    noisy = runs.train(llama, data, tmp_path / "ours", stage="lmtp2", head_weight=0.0, neftune_noise_alpha=20.0, **run)
    plain = runs.train(llama, data, tmp_path / "plain", stage="lmtp2", head_weight=0.0, **run)
    assert runs.step_losses(noisy) == pytest.approx(runs.step_losses(sft), rel=1e-4)
    assert runs.step_losses(noisy) != pytest.approx(runs.step_losses(plain), rel=1e-3)


@pytest.mark.parametrize("packing", [{"packing": True}, {"neat_packing": True}])
@pytest.mark.parametrize("inputs", ["state", "layers"])
def test_packing_trains(packing, inputs, llama, data, tmp_path):
    packed = {"cutoff_len": 128, "stage": "lmtp2", "finetuning_type": "lora", "max_steps": 6, "head_inputs": inputs}
    packed |= packing
    logged = steps(runs.train(llama, data, tmp_path, per_device_train_batch_size=1, **packed))
    assert logged[-1]["loss"] < logged[0]["loss"]


def test_a_streamed_dataset_trains(llama, data, tmp_path):
    entries = runs.train(
        llama, data, tmp_path, streaming=True, preprocessing_num_workers=None, dataloader_num_workers=1
    )
    assert len(steps(entries)) == 4


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_qlora_trains_backbone_and_heads(kind, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = tiny_models.save_llama(tmp_path / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    run = {"stage": "lmtp2", "finetuning_type": "lora", "quantization_bit": 4, "head_kind": kind, "max_steps": 8}
    logged = steps(runs.train(model, data, tmp_path / "out", **run))
    assert logged[-1]["loss_head_3"] < logged[0]["loss_head_3"]
    assert load_heads(tmp_path / "out").config.head_kind == kind


def test_a_replaced_forward_of_the_base_class_changes_nothing(llama, data, tmp_path, monkeypatch):
    """Liger replaces ``forward`` of the model class before it loads; ours never calls it for the loss."""
    from transformers import LlamaForCausalLM

    run = {"stage": "lmtp2", "finetuning_type": "lora", "max_steps": 2}
    before = runs.train(llama, data, tmp_path / "a", **run)

    forward = LlamaForCausalLM.forward

    def fused(self, input_ids=None, labels=None, **kwargs):
        assert labels is None, "the base's own loss was computed"
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", fused)
    assert runs.step_losses(runs.train(llama, data, tmp_path / "b", **run)) == runs.step_losses(before)


@pytest.mark.parametrize(
    ("stage", "method"), [("lmtp1", "full"), ("lmtp2", "lora"), ("lmtp2", "full")], ids=["stage 1", "lora", "full"]
)
def test_resuming_continues_exactly(stage, method, llama, data, tmp_path):
    run = {"stage": stage, "finetuning_type": method, "max_steps": 6, "save_strategy": "steps", "save_steps": 3,
           "lr_scheduler_type": "cosine", "overwrite_output_dir": None}  # fmt: skip
    whole = runs.train(llama, data, tmp_path / "whole", **run)
    runs.train(llama, data, tmp_path / "cut", **run)
    (tmp_path / "cut" / "trainer_state.json").unlink()
    resumed = runs.train(
        llama, data, tmp_path / "cut", **run, resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3")
    )
    assert runs.step_losses(resumed) == runs.step_losses(whole)
    a, b = load_heads(tmp_path / "whole").state_dict(), load_heads(tmp_path / "cut").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_heads_are_loaded_at_the_end(llama, data, tmp_path):
    entries = runs.train(
        llama, data, tmp_path, val_size=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, learning_rate=0.5, max_steps=4,
    )  # fmt: skip
    losses = {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    kept, saved = load_heads(tmp_path).state_dict(), load_heads(tmp_path / f"checkpoint-{best}").state_dict()
    assert all(torch.equal(kept[name], saved[name]) for name in saved)


def test_gradient_checkpointing_and_dora_change_nothing_or_little(llama, data, tmp_path):
    run = {"stage": "lmtp2", "finetuning_type": "lora", "max_steps": 3}
    without = runs.train(llama, data, tmp_path / "a", disable_gradient_checkpointing=True, **run)
    with_it = runs.train(llama, data, tmp_path / "b", **run)
    assert runs.step_losses(with_it) == pytest.approx(runs.step_losses(without), rel=1e-5)
    dora = runs.train(llama, data, tmp_path / "c", use_dora=True, **run)
    assert runs.step_losses(dora)[0] == pytest.approx(runs.step_losses(without)[0], rel=1e-5)


def test_train_lm_head_beside_lora(llama, data, stage1, tmp_path):
    runs.train(
        llama,
        data,
        tmp_path,
        stage="lmtp2",
        finetuning_type="lora",
        train_lm_head=True,
        stage1_pretrained_path=str(stage1),
    )
    saved = load_file(tmp_path / "adapter_model.safetensors")
    lm_head = next(tensor for name, tensor in saved.items() if "lm_head" in name)
    base = load_file(llama / "model.safetensors")
    assert not torch.equal(lm_head, base["model.embed_tokens.weight"])


def test_an_lm_head_that_is_not_tied_is_tuned_with_freeze_as_advised(data, tmp_path):
    base = tiny_models.save_llama(tmp_path / "untied")
    run = {"stage": "lmtp2", "finetuning_type": "freeze", "freeze_trainable_layers": 1}
    with pytest.raises(LMTPError, match="with freeze write freeze_extra_modules: lm_head instead"):
        runs.train(base, data, tmp_path / "refused", train_lm_head=True, **run)
    runs.train(base, data, tmp_path / "out", freeze_extra_modules="lm_head", **run)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


@pytest.mark.parametrize(
    "run",
    [
        {"stage": "lmtp1", "head_kind": "own"},
        {"stage": "lmtp1", "head_kind": "shared"},
        {"stage": "lmtp2", "finetuning_type": "lora", "train_lm_head": True, "head_kind": "shared"},
        {"stage": "lmtp2", "finetuning_type": "lora", "lora_target": "all,lm_head", "head_kind": "shared"},
        {"stage": "lmtp2", "finetuning_type": "full", "disable_gradient_checkpointing": True},
        {"stage": "lmtp2", "finetuning_type": "full", "disable_gradient_checkpointing": False},
        {"stage": "lmtp1", "draft_vocab_size": 64, "head_inputs": "state_token"},
        {"stage": "lmtp1", "head_inputs": "layers"},
        {"stage": "lmtp2", "finetuning_type": "full", "head_inputs": "layers"},
        {"stage": "lmtp2", "finetuning_type": "lora", "head_inputs": "layers", "disable_gradient_checkpointing": True},
        {"stage": "lmtp2", "finetuning_type": "lora", "head_inputs": "layers", "use_reentrant_gc": False},
        {"stage": "lmtp1", "draft_vocab_size": 64, "head_kind": "shared", "head_block": "mlp"},
        {"stage": "lmtp2", "finetuning_type": "full", "draft_vocab_size": 64, "head_kind": "shared"},
        {"stage": "lmtp2", "finetuning_type": "lora", "draft_vocab_size": 64, "head_inputs": "state_token"},
        {
            "stage": "lmtp2",
            "finetuning_type": "lora",
            "train_lm_head": True,
            "draft_vocab_size": 64,
            "head_kind": "shared",
        },
    ],
    ids=lambda run: "-".join(str(value) for value in run.values()),
)
def test_every_path_of_the_loss_trains_the_same(run, llama, data, tmp_path, lines):
    ours = runs.train(llama, data, tmp_path / "torch", lmtp_loss="torch", **run)
    eager = runs.train(llama, data, tmp_path / "eager", lmtp_loss="eager", **run)
    assert runs.step_losses(ours) == pytest.approx(runs.step_losses(eager), rel=1e-4)
    said = [line for line in lines if line.startswith("Leap loss: ")]
    assert said[0].startswith("Leap loss: chunks of at most 256 MB of logits, softmax in plain torch")
    assert ("autograd computes the gradient" in said[0]) == ("lora_target" in run)
    assert said[1] == "Leap loss: eager, every head's logits at once."
