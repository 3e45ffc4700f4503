"""The tables of a draft vocabulary, and heads whose logits and targets are indices into it."""

import json

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers import tiny_data, tiny_models
from helpers.tiny_models import randomise_heads
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lmtp_factory import LMTPConfig, LMTPError, attach_heads, load_model
from lmtp_factory.modeling import draft_vocabulary, load_heads


@given(st.lists(st.lists(st.integers(0, 11), max_size=6), max_size=6), st.integers(1, 12))
def test_the_most_frequent_tokens_are_chosen(rows, size):
    chosen = draft_vocabulary.most_frequent(rows, size, 12)
    counts = {token: sum(row.count(token) for row in rows) for token in range(12)}
    assert len(chosen) == size and chosen == sorted(set(chosen))
    left_out = [counts[token] for token in range(12) if token not in chosen]
    assert not left_out or max(left_out) <= min(counts[token] for token in chosen)


@given(st.sets(st.integers(0, 19), min_size=1))
def test_the_tables_lead_there_and_back(tokens):
    tokens = torch.tensor(sorted(tokens))
    d2t, t2d = draft_vocabulary.tables(tokens, 20)
    draft_vocabulary.check_tables(d2t, t2d, "here")
    assert torch.equal(draft_vocabulary.tokens_of(d2t), tokens)
    labels = torch.tensor([-100, *range(20)])
    for label, index in zip(labels.tolist(), draft_vocabulary.to_draft(labels, t2d).tolist()):
        assert index == (tokens.tolist().index(label) if label in tokens.tolist() else -100)


TOKENS = list(range(20, 200, 3))


def with_heads(stage=1, **config):
    torch.manual_seed(0)
    config = LMTPConfig(offsets=(2, 3, 6), draft_vocab_size=len(TOKENS), **config)
    model = attach_heads(tiny_models.llama(), config, stage=stage, draft_tokens=TOKENS)
    randomise_heads(model)
    return model.train()


@pytest.mark.parametrize("kind", ["own", "shared"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("implementation", ["torch", "eager"])
def test_losses_are_those_of_logits_cut_to_the_vocabulary(kind, stage, implementation):
    model, batch = with_heads(stage, head_kind=kind), tiny_data.batch()
    model.loss_implementation = implementation
    outputs = model(**batch)
    labels, (z, lm_head) = (
        batch["labels"],
        (model.final_hidden_states(input_ids=batch["input_ids"]), model.lm_head.weight),
    )
    first = model.objective.first_head
    for index, offset in enumerate(model.leap_heads.config.offsets[first:]):
        head, targets = index + first, labels[:, offset:]
        if head:
            leap = model.leap_heads.heads[head - 1]
            matrix = lm_head[TOKENS] if kind == "shared" else leap.unembed.weight
            logits = leap.features(z)[:, :-offset] @ matrix.T
            kept = torch.isin(targets, torch.tensor(TOKENS))
            targets = torch.searchsorted(torch.tensor(TOKENS), targets).where(kept, -100)
        else:
            logits, kept = z[:, :-offset] @ lm_head.T, targets != -100
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(outputs.losses[index], expected)
        assert outputs.counts[index] == kept.sum()
        assert outputs.outside[index] == ((labels[:, offset:] != -100) & ~kept).sum()
        assert outputs.hits[index] == ((logits.argmax(-1) == targets) & kept).sum()


@pytest.mark.parametrize("kind", ["own", "shared"])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_do_not_depend_on_the_implementation(kind, stage):
    """A tied or trained LM head gets the gradient of the rows that heads read, and its own."""
    gradients = {}
    for implementation in ("torch", "eager"):
        model = with_heads(stage, head_kind=kind)
        model.loss_implementation = implementation
        model(**tiny_data.batch()).loss.backward()
        gradients[implementation] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients["torch"].keys() == gradients["eager"].keys()
    assert ("lm_head.weight" in gradients["torch"]) == (stage == 2)
    for name, gradient in gradients["torch"].items():
        torch.testing.assert_close(gradient, gradients["eager"][name], msg=name)


def test_own_unembeddings_start_as_rows_of_the_lm_head():
    config = LMTPConfig(draft_vocab_size=len(TOKENS), head_kind="own")
    model = attach_heads(tiny_models.llama(), config, draft_tokens=TOKENS)
    for head in model.leap_heads.heads:
        assert torch.equal(head.unembed.weight, model.lm_head.weight[TOKENS])


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_saved_and_loaded(kind, tmp_path):
    base = tiny_models.save_llama(tmp_path / "base")
    config = LMTPConfig(draft_vocab_size=len(TOKENS), head_kind=kind)
    model = attach_heads(tiny_models.load(base), config, draft_tokens=TOKENS)
    randomise_heads(model)
    model.save_pretrained(tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.leap_heads.draft_tokens.tolist() == TOKENS
    assert json.loads((tmp_path / "out" / "lmtp" / "config.json").read_text())["dtype"] == "float32"
    hidden = torch.randn(3, model.config.hidden_size)
    logits = loaded.leap_heads.logits(hidden, loaded.lm_head)
    assert torch.equal(logits, model.leap_heads.logits(hidden, model.lm_head)) and logits.shape[-1] == len(TOKENS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"d2t": t["d2t"] + 1}, "d2t and t2d in .* contradict each other"),
        (lambda t: t | {"t2d": ~t["t2d"]}, "contradict each other"),
        (lambda t: t | {"t2d": t["t2d"].to(torch.uint8)}, "holds t2d as U8, but it is read as BOOL only"),
        (lambda t: t | {"d2t": t["d2t"].float()}, "holds d2t as F32, but it is read as I64 only"),
        (lambda t: {name: tensor for name, tensor in t.items() if name != "d2t"}, "first at d2t"),
    ],
)
def test_damaged_tables_are_refused(change, said, tmp_path):
    config = LMTPConfig(draft_vocab_size=len(TOKENS))
    model = attach_heads(tiny_models.llama(), config, draft_tokens=TOKENS)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "lmtp" / "model.safetensors"
    save_file(change(load_file(weights)), weights)
    with pytest.raises(LMTPError, match=said):
        load_heads(tmp_path)


def test_another_number_of_tokens_is_refused():
    with pytest.raises(LMTPError, match="draft_vocab_size is 9, but 8 tokens are given"):
        attach_heads(tiny_models.llama(), LMTPConfig(draft_vocab_size=9), draft_tokens=range(8))
    with pytest.raises(LMTPError, match="draft_vocab_size is 9, but 0 tokens are given"):
        attach_heads(tiny_models.llama(), LMTPConfig(draft_vocab_size=9))
    with pytest.raises(LMTPError, match="draft_vocab_size is None, but 8 tokens are given"):
        attach_heads(tiny_models.llama(), draft_tokens=range(8))


@pytest.mark.parametrize("tokens", [[9, 3, 7], [3, 3, 7], [3, 7, 99_999], [-1, 3, 7]], ids=str)
def test_tokens_that_do_not_rise_inside_the_vocabulary_are_refused(tokens):
    with pytest.raises(LMTPError, match="has to rise from 0 to at most .*: give sorted token ids"):
        attach_heads(tiny_models.llama(), LMTPConfig(draft_vocab_size=3), draft_tokens=tokens)


def test_heads_that_have_their_vocabulary_take_no_other():
    heads = with_heads().leap_heads
    with pytest.raises(LMTPError, match="have their draft vocabulary already"):
        attach_heads(tiny_models.llama(), heads=heads, draft_tokens=TOKENS)


def rows_of_wrapped_heads():
    """LM heads that are no plain frozen layer on a device."""

    def offloaded(layer):
        add_hook_to_module(
            layer, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=dict(layer.state_dict()))
        )
        assert layer.weight.is_meta
        return layer

    yield "trained", lambda layer: layer.requires_grad_()
    yield (
        "lora",
        lambda layer: get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"])).base_model.model[0],
    )
    yield "offloaded", offloaded


@pytest.mark.parametrize(
    ("name", "wrap"), rows_of_wrapped_heads(), ids=lambda part: part if isinstance(part, str) else ""
)
@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_any_lm_head_are_its_logits(name, wrap, bias):
    torch.manual_seed(0)
    layer, hidden, tokens = nn.Linear(8, 30, bias=bias), torch.randn(3, 8), torch.tensor([1, 4, 29])
    expected = layer(hidden)[:, tokens]
    wrapped = wrap(layer)
    torch.testing.assert_close(draft_vocabulary.rows_of(wrapped, tokens)(hidden), expected)
    with torch.no_grad():
        torch.testing.assert_close(draft_vocabulary.rows_of(wrapped, tokens)(hidden), expected)


def test_rows_that_need_no_gradient_are_copied_once():
    layer, tokens = nn.Linear(8, 30), torch.tensor([1, 4, 29])
    assert type(draft_vocabulary.rows_of(layer, tokens)) is draft_vocabulary.LMHeadRows
    with torch.no_grad():
        assert type(draft_vocabulary.rows_of(layer, tokens)) is nn.Linear
