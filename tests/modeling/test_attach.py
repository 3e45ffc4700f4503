"""Heads on every supported architecture: the loss against brute force, freezing, saving and loading."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_models
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from lmtp_factory import LeapHeads, LMTPConfig, LMTPError, attach_heads, load_model
from lmtp_factory.modeling import heads_of
from lmtp_factory.modeling.checkpoint import find_heads, load_heads, save_heads, validate_checkpoint


ARCHITECTURES = {
    "llama": lambda d: tiny_models.save_llama(d),
    "llama-tied": lambda d: tiny_models.save_llama(d, tie=True),
    "qwen2": lambda d: tiny_models.save_qwen2(d),
    "qwen3-tied": lambda d: tiny_models.save_qwen3(d),
    "mistral": lambda d: tiny_models.save_mistral(d),
    "gemma3-text": lambda d: tiny_models.save_gemma3_text(d),
    "gemma3-softcap": lambda d: tiny_models.save_gemma3_text(d, final_logit_softcapping=2.0),
    "gemma3": lambda d: tiny_models.save_gemma3(d),
}
CONFIGS = {
    "paper": {},
    "shared": {"head_kind": "shared"},
    "mtp": {"num_heads": 2, "stride": 1},
    "rising": {"offsets": (2, 3, 6), "head_layers": 2},
    "one head": {"num_heads": 1, "stride": 4},
}


def load(path):
    auto = AutoModelForImageTextToText if "gemma3" in str(AutoConfig.from_pretrained(path).architectures) and (
        "Conditional" in str(AutoConfig.from_pretrained(path).architectures)
    ) else AutoModelForCausalLM  # fmt: skip
    return auto.from_pretrained(path)


def batch(rows=2, length=19, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 200, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def randomise(model):
    """Untrained blocks are the identity; give them weights so that a wrong wiring shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in heads_of(model).parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def brute_force(model, inputs, stage):
    """Mean loss of every head, one position at a time, from the model's own hidden states."""
    config, lm_head = model.leap_heads.config, model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    extra = {"token_type_ids": torch.zeros_like(inputs["input_ids"])} if hasattr(model.config, "text_config") else {}
    hidden = model.base_model(inputs["input_ids"], attention_mask=inputs["attention_mask"], **extra).last_hidden_state
    losses = []
    for i, offset in enumerate(config.offsets):
        if i == 0 and stage == 1:
            continue
        terms = []
        for row in range(hidden.shape[0]):
            for s in range(hidden.shape[1] - offset):
                target = inputs["labels"][row, s + offset]
                if target == -100:
                    continue
                z = hidden[row, s]
                if i > 0:
                    head = model.leap_heads.heads[i - 1]
                    for block in head.blocks:
                        z = z + F.silu(z @ block.leap_proj.weight.T + block.leap_proj.bias)
                own = i > 0 and config.head_kind == "own"
                logits = z @ (model.leap_heads.heads[i - 1].unembed.weight if own else lm_head.weight).T
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                terms.append(-torch.log_softmax(logits, -1)[target])
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["own", "shared"])
def test_losses_of_every_architecture(architecture, kind, tmp_path):
    model = load(ARCHITECTURES[architecture](tmp_path))
    attach_heads(model, LMTPConfig(head_kind=kind), stage=2, head_weight=0.1)
    randomise(model)
    model.train()
    inputs = batch()
    outputs = model(**inputs)
    expected = brute_force(model, inputs, stage=2)
    torch.testing.assert_close(outputs.losses, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.loss, expected[0] + 0.1 * expected[1:].sum(), rtol=1e-4, atol=1e-5)
    assert type(model).__name__ == model.config.architectures[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_every_geometry(name, stage, tmp_path):
    model = load(tiny_models.save_llama(tmp_path))
    attach_heads(model, LMTPConfig(**CONFIGS[name]), stage=stage, head_decay=0.5)
    randomise(model)
    inputs = batch()
    model(**inputs).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = [p.grad for p in trained]

    losses = brute_force(model, inputs, stage)
    weights = [0.5**i for i in range(model.leap_heads.config.num_heads)]
    weights = weights if stage == 1 else [1.0, *(0.1 * w for w in weights)]
    expected = torch.autograd.grad((losses * torch.tensor(weights)).sum(), trained)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    assert {id(p) for p in trained} >= {id(p) for p in model.leap_heads.parameters()}
    if stage == 1:
        assert len(trained) == len(list(model.leap_heads.parameters()))


def test_next_token_loss_is_upstream_s_own(tmp_path):
    path = tiny_models.save_llama(tmp_path, tie=True)
    inputs = batch()
    plain = load(path)(**inputs).loss
    model = attach_heads(load(path), stage=2)
    torch.testing.assert_close(model(**inputs).losses[0], plain)


def test_packed_documents_equal_separate_ones(tmp_path):
    """Losses of two documents in one row, with a block-diagonal mask, are those of the documents on their own."""
    path = tiny_models.save_llama(tmp_path)
    model = attach_heads(load(path), LMTPConfig(offsets=(2, 5)), stage=2)
    first, second = batch(1, 7, seed=1), batch(1, 11, seed=2)
    separate = [model(**document) for document in (first, second)]
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in (7, 11))).bool()[None, None]
    packed = model(
        input_ids=torch.cat([first["input_ids"], second["input_ids"]], 1),
        labels=torch.cat([first["labels"], second["labels"]], 1),
        attention_mask=torch.where(mask, 0.0, torch.finfo(torch.float32).min),
        position_ids=torch.cat([torch.arange(7), torch.arange(11)])[None],
    )
    torch.testing.assert_close(packed.loss_sums, sum(o.loss_sums for o in separate), rtol=1e-4, atol=1e-4)
    assert torch.equal(packed.counts, sum(o.counts for o in separate))


def test_heads_are_averaged_over_the_given_counts(tmp_path):
    model = attach_heads(load(tiny_models.save_llama(tmp_path)), LMTPConfig(num_heads=1), stage=2, head_weight=1.0)
    outputs = model(**batch(), num_items_in_batch=torch.tensor([10, 40]))
    torch.testing.assert_close(outputs.loss, outputs.loss_sums[0] / 10 + outputs.loss_sums[1] / 40)


def test_fresh_heads_predict_what_the_lm_head_predicts(tmp_path):
    model = attach_heads(load(tiny_models.save_llama(tmp_path)))
    hidden = torch.randn(3, model.config.hidden_size)
    logits = model.leap_heads.logits(hidden, model.get_output_embeddings())
    torch.testing.assert_close(logits, model.lm_head(hidden).expand(3, 3, -1))


def test_without_labels_or_stage_the_model_is_its_base(tmp_path):
    path = tiny_models.save_llama(tmp_path)
    inputs = batch()
    plain, model = load(path), attach_heads(load(path))
    assert torch.equal(model(inputs["input_ids"]).logits, plain(inputs["input_ids"]).logits)
    assert torch.equal(model(**inputs).loss, plain(**inputs).loss)  # an evaluation harness passes labels
    generated = [m.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False) for m in (plain, model)]
    assert torch.equal(*generated)


def test_save_and_load_an_export_with_heads(tmp_path):
    model = attach_heads(load(tiny_models.save_llama(tmp_path / "base")), LMTPConfig(offsets=(2, 3, 6)), stage=2)
    randomise(model)
    model.save_pretrained(tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    ids = batch()["input_ids"]
    assert loaded.leap_heads.config.offsets == (1, 2, 3, 6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    for name, tensor in model.leap_heads.state_dict().items():
        assert torch.equal(loaded.leap_heads.state_dict()[name], tensor), name
    assert isinstance(AutoModel.from_pretrained(tmp_path / "out" / "lmtp"), LeapHeads)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    # What tools that know nothing of heads see: exactly the base's tensors.
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(load(tmp_path / "base").state_dict())


def test_plain_transformers_reads_a_heads_export(tmp_path):
    model = attach_heads(load(tiny_models.save_llama(tmp_path / "base")), stage=2)
    model.save_pretrained(tmp_path / "out")
    program = (
        "import sys, transformers; m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "assert 'lmtp_factory' not in sys.modules and type(m).__mro__[0].__module__.startswith('transformers')"
    )
    environment = {"LMTP_FACTORY_DISABLE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=True, env=environment)


def test_stage_one_saves_heads_only(tmp_path):
    base = tiny_models.save_llama(tmp_path / "base")
    model = attach_heads(load(base), LMTPConfig(base_model=str(base)), stage=1)
    randomise(model)
    model.save_pretrained(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["lmtp"]
    assert sorted(p.name for p in (tmp_path / "out" / "lmtp").iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_model(tmp_path / "out")  # its config names the base
    assert torch.equal(loaded.leap_heads.heads[2].unembed.weight, model.leap_heads.heads[2].unembed.weight)


def test_heads_beside_a_peft_adapter(tmp_path):
    base = tiny_models.save_llama(tmp_path / "base")
    model = get_peft_model(
        load(base), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    )
    attach_heads(model, stage=2)
    outputs = model(**batch())
    outputs.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n or "leap_heads" in n)
    model.save_pretrained(tmp_path / "adapter")
    assert not any("leap" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    save_heads(heads_of(model), tmp_path / "adapter" / "lmtp")
    loaded = load_model(tmp_path / "adapter")
    assert isinstance(loaded, PeftModel)
    ids = batch()["input_ids"]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_heads_of_another_base_are_refused(tmp_path):
    model = attach_heads(load(tiny_models.save_llama(tmp_path / "a")), LMTPConfig(base_model="first"), stage=2)
    save_heads(model.leap_heads, tmp_path / "lmtp")
    other = load(tiny_models.save_llama(tmp_path / "b", hidden_size=16, head_dim=4))
    with pytest.raises(LMTPError, match=r"belong to first \(hidden size 32\), not to .*b \(hidden size 16\)"):
        attach_heads(other, heads=load_heads(tmp_path))


def test_a_heads_export_whose_tokenizer_was_changed_is_refused(tmp_path):
    base = tiny_models.save_llama(tmp_path / "base")
    model = attach_heads(load(base), LMTPConfig(base_model="base", tokenizer_fingerprint="0123456789abcdef"), stage=1)
    model.leap_heads.config.base_model = str(base)
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(LMTPError, match=r"tokenizer 0123456789abcdef\), not to .*base \(tokenizer"):
        load_model(tmp_path / "out")


def test_damaged_heads_are_refused_before_they_load(tmp_path):
    model = attach_heads(load(tiny_models.save_llama(tmp_path / "base")))
    save_heads(model.leap_heads, tmp_path / "lmtp")
    weights, config = tmp_path / "lmtp" / "model.safetensors", tmp_path / "lmtp" / "config.json"
    validate_checkpoint(tmp_path / "lmtp")

    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LMTPError, match="truncated or damaged"):
        validate_checkpoint(tmp_path / "lmtp")
    weights.write_bytes(whole)

    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if ".2." not in name}, weights)
    with pytest.raises(LMTPError, match="does not fit"):
        load_heads(tmp_path)
    weights.unlink()
    with pytest.raises(LMTPError, match="is missing"):
        validate_checkpoint(tmp_path / "lmtp")

    config.write_text(config.read_text()[:40])
    with pytest.raises(LMTPError, match="is damaged"):
        validate_checkpoint(tmp_path / "lmtp")
    config.unlink()
    with pytest.raises(LMTPError, match="is missing"):
        validate_checkpoint(tmp_path / "lmtp")
    with pytest.raises(LMTPError, match="has no lmtp/ folder"):
        load_heads(tmp_path / "base")
    assert find_heads("no/such-model-anywhere") is None


def test_a_failed_write_leaves_the_old_heads(tmp_path, monkeypatch):
    model = attach_heads(load(tiny_models.save_llama(tmp_path / "base")))
    folder = tmp_path / "lmtp"
    save_heads(model.leap_heads, folder)
    before = (folder / "model.safetensors").read_bytes()
    randomise(model)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LMTPConfig, "save_pretrained", full)  # the weights are written by then
    with pytest.raises(OSError, match="No space left"):
        save_heads(model.leap_heads, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("lmtp")] == ["lmtp"]


def test_a_second_attach_is_refused(tmp_path):
    model = attach_heads(load(tiny_models.save_llama(tmp_path)))
    with pytest.raises(LMTPError, match="leap heads already"):
        attach_heads(model)
