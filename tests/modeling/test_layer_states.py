"""Heads that read a weighted sum of all layers' states, against the definition and against heads that read the final one."""

import copy
import pickle
import threading

import pytest
import torch
from helpers import tiny_models
from helpers.tiny_models import randomise_heads

from lmtp_factory import LMTPConfig, LMTPError, attach_heads, load_model
from lmtp_factory.modeling import heads_of, layer_states
from lmtp_factory.modeling.checkpoint import check_base, load_heads, read_config
from lmtp_factory.modeling.layer_states import mix, recorded


LAYERS = 5


def llama(stage=None, seed=0, base=None, **config):
    torch.manual_seed(seed)
    base = base or tiny_models.llama(num_hidden_layers=LAYERS)
    return attach_heads(base, LMTPConfig(**{"head_inputs": "layers"} | config), stage)


def batch(rows=2, length=14, masked=5):
    ids = torch.randint(5, 300, (rows, length), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :masked] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def defined(model, ids, head):
    """What a head reads, by the definition in the module's docstring, from the states that transformers returns."""
    states = model.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states[1:]
    final = states[-1]  # behind the final norm
    weights = (final.shape[-1] ** 0.5 * model.leap_heads.heads[head].leap_mix).softmax(0) - 1 / len(states)
    rms = final.square().mean(-1, keepdim=True).sqrt()
    scaled = [state / state.square().mean(-1, keepdim=True).sqrt() * rms for state in states[:-1]] + [final]
    return final + sum(weight * state for weight, state in zip(weights, scaled))


def mixed(model, ids):
    with recorded(model) as layers:
        hidden = model.final_hidden_states(input_ids=ids)
    return model.leap_heads.inputs(hidden, layers)  # (batch, length, heads, hidden)


@pytest.mark.parametrize("rows", [None, 3, 1], ids=["at once", "in parts", "row by row"])
def test_what_a_head_reads_is_as_defined(rows, monkeypatch):
    model, ids = llama(), batch()["input_ids"]
    randomise_heads(model)
    if rows is not None:
        monkeypatch.setattr(layer_states, "_STATE_BYTES", 4 * LAYERS * model.config.hidden_size * rows)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            ours = mixed(model, ids)
            for head in range(3):
                torch.testing.assert_close(ours[:, :, head], defined(model, ids, head), rtol=1e-4, atol=1e-5)
                assert not torch.allclose(ours[:, :, head], ours[:, :, head - 1], atol=1e-3)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_start_as_heads_of_the_final_state(stage, dtype):
    ours = llama(stage, base=tiny_models.llama(num_hidden_layers=LAYERS).to(dtype))
    theirs = llama(stage, head_inputs="state", base=tiny_models.llama(num_hidden_layers=LAYERS).to(dtype))
    for implementation in ("torch", "eager"):
        ours.loss_implementation = theirs.loss_implementation = implementation
        a, b = ours(**batch()), theirs(**batch())
        assert torch.equal(a.loss, b.loss) and torch.equal(a.losses, b.losses) and torch.equal(a.hits, b.hits)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_those_of_the_definition(stage, monkeypatch):
    """The weights', the blocks' and in stage 2 the backbone's, against autograd through the definition."""
    monkeypatch.setattr(layer_states, "_STATE_BYTES", 4 * LAYERS * 32 * 4)
    model, inputs = llama(stage, offsets=(2, 4)), batch()
    randomise_heads(model)
    model(**inputs).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    ids, labels = inputs["input_ids"], inputs["labels"]
    loss = 0
    for head, (leap, offset) in enumerate(zip(model.leap_heads.heads, (2, 4))):
        reads = defined(model, ids, head)
        logits = leap.unembed(leap.features(reads))[:, :-offset]
        loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, offset:].flatten())
    if stage == 2:
        logits = model.lm_head(model.final_hidden_states(input_ids=ids))[:, :-1]
        next_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss = next_token + 0.1 * loss
    loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys() and any("leap_mix" in name for name in ours)
    for name, gradient in theirs.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(ours[name], gradient, rtol=2e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_flow_through_checkpointed_layers(reentrant):
    """The hooks run inside the checkpointed function, without autograd if it is reentrant."""
    plain, checkpointed = llama(2), llama(2)
    for model in (plain, checkpointed):
        randomise_heads(model)
        model.train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    assert all(layer.gradient_checkpointing and layer.training for layer in checkpointed.base_model.layers)
    for model in (plain, checkpointed):
        model(**batch()).loss.backward()
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_losses_of_every_implementation_agree():
    model = llama(2)
    randomise_heads(model)
    losses, gradients = [], []
    for implementation in ("torch", "eager"):
        model.loss_implementation = implementation
        model.zero_grad()
        output = model(**batch())
        output.loss.backward()
        losses.append(output.losses)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*losses)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6, msg=name)


def test_stage_one_keeps_no_graph_of_the_backbone():
    model = llama(1).train()
    output = model(**batch())
    output.loss.backward()
    assert all(head.leap_mix.grad.abs().sum() > 0 for head in model.leap_heads.heads)
    assert all(p.grad is None for name, p in model.named_parameters() if "leap_heads" not in name)


def test_only_heads_that_read_layers_watch_them():
    model = llama(head_inputs="state")
    assert not any(module._forward_pre_hooks for module in model.modules())
    with recorded(model) as layers:
        assert layers is None
    hidden = torch.randn(2, 32)
    assert model.leap_heads.inputs(hidden, layers) is hidden


def test_last_positions_are_copied():
    model, ids = llama(), batch()["input_ids"]
    with torch.no_grad():
        with recorded(model) as all_states:
            model.final_hidden_states(input_ids=ids)
        with recorded(model, last=3) as last:
            model.final_hidden_states(input_ids=ids)
    assert len(all_states) == len(last) == LAYERS - 1
    for whole, part in zip(all_states, last):
        assert torch.equal(whole[:, -3:], part)
        assert part.untyped_storage().nbytes() == part.numel() * 4


def test_threads_record_their_own_forwards():
    model, found, barrier = llama(), {}, threading.Barrier(3)

    def run(length):
        ids = batch(1, length)["input_ids"]
        with torch.no_grad(), recorded(model) as states:
            barrier.wait()
            hidden = model.final_hidden_states(input_ids=ids)
        found[length] = [state.shape for state in states], hidden.shape

    threads = [threading.Thread(target=run, args=(length,)) for length in (4, 7, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: ([torch.Size((1, n, 32))] * (LAYERS - 1), torch.Size((1, n, 32))) for n in (4, 7, 9)}


def test_a_forward_without_all_layers_is_refused():
    model, ids = llama(1), batch()["input_ids"]
    with pytest.raises(LMTPError, match="A forward ran 4 decoder layers instead of 5"), recorded(model):
        layers, model.base_model.layers = model.base_model.layers, model.base_model.layers[:-1]
        model.final_hidden_states(input_ids=ids)
    model.base_model.layers = layers
    with pytest.raises(ValueError, match="mine"), recorded(model):
        raise ValueError("mine")
    with pytest.raises(LMTPError, match="read more than final hidden states: leave hidden_states out"):
        model.leap_loss(labels=batch()["labels"], hidden_states=torch.zeros(2, 14, 32))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reads_its_own_layers(duplicate):
    model = llama()
    randomise_heads(model)
    other, ids = duplicate(model), batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(mixed(other, ids), mixed(model, ids))
        other.base_model.layers[1].mlp.down_proj.weight.mul_(2)
        assert not torch.equal(mixed(other, ids), mixed(model, ids))


def test_saved_heads_come_back(tmp_path):
    base = tiny_models.load(tiny_models.save_llama(tmp_path / "base", num_hidden_layers=LAYERS))
    model = llama(1, base=base)
    randomise_heads(model)
    model.save_pretrained(tmp_path / "heads")
    config = read_config(tmp_path / "heads" / "lmtp")
    assert (config.head_inputs, config.base_layers) == ("layers", LAYERS)
    loaded, ids = load_model(str(tmp_path / "heads")), batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(mixed(loaded, ids), mixed(model, ids))
    assert {"heads.0.leap_mix", "heads.2.leap_mix"} <= set(load_heads(tmp_path / "heads").state_dict())


def test_a_missing_or_wrong_number_of_layers_is_refused(tmp_path):
    model = llama(1)
    model.save_pretrained(tmp_path)
    path = tmp_path / "lmtp" / "config.json"
    path.write_text(path.read_text().replace('"base_layers"', '"layers"'))
    with pytest.raises(LMTPError, match="does not say base_layers"):
        read_config(path.parent)
    with pytest.raises(LMTPError, match="number of layers 5\\), not to .* \\(number of layers 2\\)"):
        check_base(model.leap_heads.config, tiny_models.llama().config)


def test_a_subset_reads_what_the_heads_read():
    model, ids = llama(offsets=(2, 3, 5)), batch()["input_ids"]
    randomise_heads(model)
    with torch.no_grad(), recorded(model) as layers:
        hidden = model.final_hidden_states(input_ids=ids)
        whole = model.leap_heads.logits(hidden, model.lm_head, layers=layers)
        part = model.leap_heads.subset((1, 2, 5)).logits(hidden, model.lm_head, layers=layers)
    assert torch.equal(part, whole[[0, 2]])


def test_a_head_does_not_depend_on_the_others_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(LAYERS, generator=generator) for _ in range(7)]
    final, *inner = (torch.randn(50, 32, generator=generator) for _ in range(LAYERS))
    together = mix(weights, final, inner)
    assert all(torch.equal(mix([weight], final, inner)[0], one) for weight, one in zip(weights, together))


ARCHITECTURES = ("llama", "gpt2", "bloom", "gemma2", "gemma3", "qwen-vl", "qwen3-moe", "falcon-h1", "granite", "cohere")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_shows_its_layers(architecture):
    model = attach_heads(tiny_models.PLAIN[architecture](), LMTPConfig(head_inputs="layers"), stage=2)
    model(**batch()).loss.backward()
    assert all(head.leap_mix.grad.abs().sum() > 0 for head in heads_of(model).heads)


def test_models_without_inner_layers_are_refused():
    with pytest.raises(LMTPError, match="LlamaForCausalLM has no inner layers that head_inputs: layers could read"):
        llama(base=tiny_models.llama(num_hidden_layers=1))
    base = tiny_models.opt()
    with pytest.raises(LMTPError, match="do not pass each other one state of the final one's size"):
        llama(base=base)
    assert not any(module._forward_pre_hooks for module in base.modules())
