"""What heads read, and the blocks that they read it with."""

import pytest
import torch
from helpers import tiny_data, tiny_models
from helpers.tiny_models import randomise_heads
from torch import nn

from lmtp_factory import LeapHeads, LMTPConfig, LMTPError, attach_heads
from lmtp_factory.modeling.blocks import BLOCKS, KnownToken


SHAPES = [
    {"head_block": block, "head_inputs": inputs, "head_layers": layers}
    for block in BLOCKS
    for inputs in ("state", "state_token")
    for layers in (1, 2)
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fresh_heads_are_the_identity(shape):
    heads = LeapHeads(LMTPConfig(offsets=(2, 5), hidden_size=8, vocab_size=20, **shape))
    heads.reset(seed=3)
    hidden, known = torch.randn(4, 8), KnownToken(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    assert torch.equal(heads.heads[1].features(hidden, known), hidden)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_parameter_learns(shape):
    """Zero weights must not keep the gradient from the others for ever."""
    model = attach_heads(tiny_models.llama(), LMTPConfig(offsets=(2, 3, 6), **shape), stage=1).train()
    before = {name: parameter.clone() for name, parameter in model.leap_heads.named_parameters()}
    optimiser = torch.optim.SGD(model.leap_heads.parameters(), lr=1.0)
    for _ in range(3):  # a gated block's other weights learn once its last one has left zero
        optimiser.zero_grad()
        model(**tiny_data.batch(rows=4, length=40)).loss.backward()
        optimiser.step()
    assert all(not torch.equal(before[name], p) for name, p in model.leap_heads.named_parameters())


def test_random_weights_depend_on_seed_and_offset_alone():
    def weights(offsets, seed):
        heads = LeapHeads(LMTPConfig(offsets=offsets, hidden_size=8, vocab_size=20, head_block="mlp"))
        heads.reset(seed)
        return {offset: head.blocks[0].leap_gate_up.weight for offset, head in zip(offsets, heads.heads)}

    many, few = weights((2, 3, 4, 5, 6), seed=1), weights((2, 6), seed=1)
    assert all(torch.equal(few[offset], many[offset]) for offset in few)
    assert not torch.equal(many[2], many[3]) and not torch.equal(many[2], weights((2,), seed=2)[2])


def test_fresh_heads_draw_no_numbers_that_others_would_draw():
    torch.manual_seed(0)
    base, expected = tiny_models.llama(), torch.get_rng_state()
    attach_heads(base, LMTPConfig(head_block="mlp"))
    assert torch.equal(torch.get_rng_state(), expected)


def known_places(config, rows, first):
    """(head, row) -> (place of the token that it reads, places looked back), as the method's page says."""
    places = {}
    for head, (near, far) in enumerate(zip(config.offsets, config.offsets[1:])):
        backs = min(far - 1, max(far - near, config.head_backs))
        for row in range(rows):
            back = (row + first) % backs
            places[head, row] = row + 1 + back, back
    return places


@pytest.mark.parametrize("head_backs", [1, 3])
@pytest.mark.parametrize("train", [True, False])
def test_a_head_is_trained_with_the_token_that_a_draft_knows(head_backs, train):
    config = LMTPConfig(offsets=(2, 3, 6), head_inputs="state_token", head_backs=head_backs)
    model = attach_heads(tiny_models.llama(), config, stage=1).train(train)
    randomise_heads(model)
    config, batch = model.leap_heads.config, tiny_data.batch(rows=1, length=12)
    torch.manual_seed(5)
    first = int(torch.randint(1 << 30, ())) if train else 0
    torch.manual_seed(5)
    outputs = model(**batch)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    states, embeddings = model.final_hidden_states(input_ids=ids[None])[0], model.get_input_embeddings()(ids)
    places = known_places(config, len(ids), first)
    for head, offset in enumerate(config.offsets[1:]):
        losses = []
        for row in range(len(ids) - offset):
            token, back = places[head, row]
            assert row < token < row + offset  # known before what is predicted
            if labels[row + offset] != -100:
                known = KnownToken(embeddings[token], torch.tensor(back))
                features = model.leap_heads.heads[head].features(states[row], known)
                matrix = model.leap_heads.heads[head].unembed
                losses.append(nn.functional.cross_entropy(matrix(features), labels[row + offset]))
        torch.testing.assert_close(outputs.losses[head], torch.stack(losses).mean())


def test_each_distance_is_trained_equally_often():
    """Whatever the positions are: along a row, restarting in packed documents, on several axes, shared by all rows."""
    config = LMTPConfig(offsets=(2, 3, 6), head_inputs="state_token", head_backs=3)
    model = attach_heads(tiny_models.llama(), config, stage=1).train()
    ids, along = torch.zeros(2, 12, dtype=torch.long), torch.arange(12)
    packed = torch.cat([torch.arange(3), torch.arange(9)])
    for positions in (None, along[None], along.expand(2, 12), packed.expand(2, 12), along.expand(3, 2, 12)):
        starts = set()
        for _ in range(8):
            turns = model._known_tokens(ids, positions)["turns"]
            assert turns.shape == (24,)
            for backs in (1, 2, 3):
                assert torch.bincount(turns % backs, minlength=backs).tolist() == [24 // backs] * backs or backs == 2
            starts.add(int(turns[0]))
        assert len(starts) > 1


def test_how_far_heads_can_look_back():
    config = LMTPConfig(offsets=(2, 3, 6), head_inputs="state_token", head_backs=3)
    assert config.backs == (1, 2, 3)
    assert LMTPConfig(offsets=(2, 3, 6), head_inputs="state_token").backs == (1, 1, 3)
    assert LMTPConfig(num_heads=3, stride=2, head_inputs="state_token").backs == (2, 2, 2)
    assert LMTPConfig(offsets=(2, 3, 6)).backs == (0, 0, 0)


def test_the_scale_of_the_embeddings_does_not_matter():
    """Gemma multiplies its embeddings by the root of the hidden size, in some versions outside the embedding layer."""
    heads = LeapHeads(LMTPConfig(offsets=(2, 4), hidden_size=8, vocab_size=20, head_inputs="state_token"))
    for parameter in heads.parameters():
        nn.init.normal_(parameter)
    hidden, embedding, back = torch.randn(3, 8), 0.02 * torch.randn(3, 8), torch.tensor([0, 1, 1])
    plain, scaled = (heads.heads[1].features(hidden, KnownToken(x, back)) for x in (embedding, 45.0 * embedding))
    torch.testing.assert_close(plain, scaled)


def test_text_without_token_ids_is_refused():
    model = attach_heads(tiny_models.llama(), LMTPConfig(head_inputs="state_token"), stage=1)
    batch = tiny_data.batch()
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(LMTPError, match="read token ids, and this batch has none: train head_inputs: state"):
        model(inputs_embeds=embeddings, **batch)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"head_block": "wide"}, "head_block is 'wide', but it has to be one of linear, mlp"),
        ({"head_inputs": "token"}, "head_inputs is 'token', but it has to be one of state, state_token"),
        ({"head_backs": 2}, "head_backs is 2, but heads that read the state alone fit any place"),
        ({"head_backs": 0, "head_inputs": "state_token"}, "head_backs is 0"),
        ({"draft_vocab_size": 0}, "draft_vocab_size is 0, but it has to be 1 or more"),
        ({"draft_vocab_size": 30, "vocab_size": 20}, "draft_vocab_size is 30, but the model has 20 tokens"),
    ],
)
def test_impossible_shapes_are_refused(values, said):
    with pytest.raises(LMTPError, match=said):
        LMTPConfig(**values)
