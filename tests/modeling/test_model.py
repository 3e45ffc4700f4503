"""What a model with leap heads feeds its backbone, and copies of such a model."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_data, tiny_models
from helpers.tiny_models import gemma3, gpt2, llama, randomise_heads
from peft import LoraConfig, get_peft_model
from transformers.integrations.neftune import activate_neftune

from lmtp_factory import LMTPConfig, attach_heads, load_model
from lmtp_factory.modeling import heads_of, load_heads
from lmtp_factory.modeling.model import LeapModel


def whole_batch():
    ids = torch.randint(300, (2, 11), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_gpt2_reads_what_it_reads_without_heads():
    inputs = whole_batch()
    plain, model = gpt2()(**inputs), attach_heads(gpt2(), stage=2)
    assert model.token_types == ()
    torch.testing.assert_close(model(**inputs).losses[0], plain.loss)
    states = model.final_hidden_states(input_ids=inputs["input_ids"])
    assert torch.equal(model.lm_head(states), plain.logits)


def test_token_types_that_are_given_are_passed_on():
    inputs = whole_batch() | {"token_type_ids": torch.ones(2, 11, dtype=torch.long)}
    torch.testing.assert_close(attach_heads(gpt2(), stage=2)(**inputs).losses[0], gpt2()(**inputs).loss)


def test_gemma3_trains_without_token_types():
    inputs = whole_batch()
    expected = gemma3()(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"])).loss
    model = attach_heads(gemma3(), stage=2).train()
    assert model.token_types in (("token_type_ids",), ())  # transformers 5.24 needs none
    torch.testing.assert_close(model(**inputs).losses[0], expected)


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "torch": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("stage", [None, 1, 2])
@pytest.mark.parametrize("how", COPIES)
def test_copies_keep_heads_and_losses(how, stage):
    model = attach_heads(llama(), LMTPConfig(offsets=(2, 4)), stage=stage, head_weight=0.3)
    with torch.no_grad():
        for parameter in model.leap_heads.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.compiled_functions = ("options", lambda: None)  # which pickle cannot write
    other = COPIES[how](model)
    assert isinstance(other, LeapModel) and type(other) is type(model)
    assert (other.objective, other.training) == (model.objective, model.training)
    assert other.compiled_functions is None and model.compiled_functions is not None
    inputs = whole_batch()
    assert torch.equal(other(**inputs).loss, model(**inputs).loss)
    ids = inputs["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(other.generate(ids, **options), model.generate(ids, **options))
    with torch.no_grad():
        other.leap_heads.heads[0].blocks[0].leap_proj.bias.add_(1.0)
    assert not torch.equal(
        other.leap_heads.heads[0].blocks[0].leap_proj.bias, model.leap_heads.heads[0].blocks[0].leap_proj.bias
    )


def test_copies_behind_peft():
    model = get_peft_model(llama(), LoraConfig(target_modules="all-linear"))
    attach_heads(model, stage=2)
    other, inputs = copy.deepcopy(model), tiny_data.batch()
    assert heads_of(other) is not heads_of(model)
    assert torch.equal(other(**inputs).loss, model(**inputs).loss)


def test_a_subclass_is_copied_as_itself():
    model = attach_heads(llama())
    model.__class__ = type("Changed", (type(model),), {})
    assert type(copy.deepcopy(model)) is type(model)


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
    model = tiny_models.load(ARCHITECTURES[architecture](tmp_path))
    attach_heads(model, LMTPConfig(head_kind=kind), stage=2, head_weight=0.1)
    randomise_heads(model)
    model.train()
    inputs = tiny_data.batch()
    outputs = model(**inputs)
    expected = brute_force(model, inputs, stage=2)
    torch.testing.assert_close(outputs.losses, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.loss, expected[0] + 0.1 * expected[1:].sum(), rtol=1e-4, atol=1e-5)
    assert type(model).__name__ == model.config.architectures[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_every_geometry(name, stage, tmp_path):
    model = tiny_models.load(tiny_models.save_llama(tmp_path))
    attach_heads(model, LMTPConfig(**CONFIGS[name]), stage=stage, head_decay=0.5)
    randomise_heads(model)
    inputs = tiny_data.batch()
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
    inputs = tiny_data.batch()
    plain = tiny_models.load(path)(**inputs).loss
    model = attach_heads(tiny_models.load(path), stage=2)
    torch.testing.assert_close(model(**inputs).losses[0], plain)


def test_packed_documents_equal_separate_ones(tmp_path):
    """Losses of two documents in one row, with a block-diagonal mask, are those of the documents on their own."""
    path = tiny_models.save_llama(tmp_path)
    model = attach_heads(tiny_models.load(path), LMTPConfig(offsets=(2, 5)), stage=2)
    first, second = tiny_data.batch(1, 7, seed=1), tiny_data.batch(1, 11, seed=2)
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


def test_the_newest_token_is_read_without_neftune_s_noise():
    model = attach_heads(llama(), LMTPConfig(head_inputs="state_token"), stage=2)
    ids, embed = torch.arange(20, 30)[None], model.get_input_embeddings()
    activate_neftune(model, 5.0)
    model.train()
    assert not torch.equal(embed(ids)[0], embed.weight[20:30])
    assert torch.equal(model._known_tokens(ids, None)["embeddings"], embed.weight[20:30])
    assert embed.training


def test_heads_are_averaged_over_the_given_counts(tmp_path):
    model = attach_heads(
        tiny_models.load(tiny_models.save_llama(tmp_path)), LMTPConfig(num_heads=1), stage=2, head_weight=1.0
    )
    outputs = model(**tiny_data.batch(), num_items_in_batch=torch.tensor([10, 40]))
    torch.testing.assert_close(outputs.loss, outputs.loss_sums[0] / 10 + outputs.loss_sums[1] / 40)


def test_without_labels_or_stage_the_model_is_its_base(tmp_path):
    path = tiny_models.save_llama(tmp_path)
    inputs = tiny_data.batch()
    plain, model = tiny_models.load(path), attach_heads(tiny_models.load(path))
    assert torch.equal(model(inputs["input_ids"]).logits, plain(inputs["input_ids"]).logits)
    assert torch.equal(model(**inputs).loss, plain(**inputs).loss)  # an evaluation harness passes labels
    generated = [m.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False) for m in (plain, model)]
    assert torch.equal(*generated)


def test_saving_where_it_was_loaded_keeps_the_measured_tree(tmp_path):
    attach_heads(llama()).save_pretrained(tmp_path)
    tree = tmp_path / "lmtp" / "tree.json"
    tree.write_text("as measured")
    model = load_model(tmp_path)
    for directory in (tmp_path, tmp_path / "elsewhere"):
        model.save_pretrained(directory)
        assert Path(directory, "lmtp", "tree.json").read_text() == "as measured"


def test_a_training_checkpoint_has_no_tree_of_older_heads(tmp_path):
    attach_heads(llama()).save_pretrained(tmp_path)
    (tmp_path / "lmtp" / "tree.json").write_text("of other heads")
    attach_heads(llama(), heads=load_heads(tmp_path), stage=2).save_pretrained(tmp_path)
    assert not (tmp_path / "lmtp" / "tree.json").exists()
