"""The window of hidden states and the draft made from it, against forwards over whole sequences."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from helpers.decoding import GEOMETRIES, TREES, decoded, oracle, padded, prompt, stock
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtp_factory.decoding import draft as draft_module
from lmtp_factory.decoding import tree_builder
from lmtp_factory.decoding.branches import Branches
from lmtp_factory.decoding.draft import Window, propose_candidates
from lmtp_factory.modeling.layer_states import recorded as recorded_layers


HEADS = {
    "own": {"head_kind": "own"},
    "shared": {"head_kind": "shared"},
    "two blocks": {"head_kind": "shared", "head_layers": 2},
    "newest token": {"head_kind": "own", "head_inputs": "state_token", "head_layers": 2},
    "gated": {"head_kind": "shared", "head_block": "mlp", "head_layers": 2},
    "gated, newest token": {"head_kind": "shared", "head_block": "mlp", "head_inputs": "state_token", "head_backs": 3},
    "all layers": {"head_kind": "own", "head_inputs": "layers"},
    "shared, all layers": {"head_kind": "shared", "head_inputs": "layers", "draft_vocab_size": 40},
    "own draft vocabulary": {"head_kind": "own", "draft_vocab_size": 40},
    "shared draft vocabulary": {"head_kind": "shared", "draft_vocab_size": 40, "head_inputs": "state_token"},
}


@given(
    size=st.integers(1, 5),
    prompts=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_the_window_is_the_last_states(size, prompts, seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(prompts), max(prompts), 2, generator=generator)
    expected = [list(row[-length:].clone()) for row, length in zip(hidden, prompts)]
    window = Window.of_prompt(hidden, prompts, size)
    hidden.zero_()  # the window has to be a copy
    finished = [False] * len(prompts)
    for _ in range(6):
        for row, states in enumerate(expected):
            if finished[row]:
                continue
            assert window.filled[row] == min(len(states), size)
            for back in range(window.filled[row]):
                assert torch.equal(window.states[row, size - 1 - back], states[-1 - back])
        nodes = rng.randint(1, 6)
        tree = torch.randn(len(prompts), nodes, 2, generator=generator)
        branches = [
            [] if done else [0, *sorted(rng.sample(range(1, nodes), rng.randint(0, nodes - 1)))] for done in finished
        ]
        window.push(tree, Branches.sent(branches, [0] * len(branches), tree.device))
        window.count(branches)
        for row, branch in enumerate(branches):
            expected[row].extend(tree[row, branch].clone())
        tree.zero_()
        finished = [done or rng.random() < 0.1 for done in finished]


def normed(vector):
    return vector / vector.square().mean().sqrt()


def through_blocks(leap, z, embedding, back):
    """A state behind the residual blocks of a head; only the first reads the newest token's embedding."""
    for number, block in enumerate(leap.blocks):
        reads_token = number == 0 and block.leap_back is not None
        x = torch.cat([normed(z), normed(embedding)]) if reads_token else z
        bias = block.leap_back[back] if reads_token else 0
        if hasattr(block, "leap_proj"):
            bias = bias if reads_token else block.leap_proj.bias
            z = z + F.silu(block.leap_proj.weight @ x + bias)
        else:
            gate, up = (block.leap_gate_up.weight @ x + bias).chunk(2)
            z = z + block.leap_down.weight @ (F.silu(gate) * up)
    return z


def brute_force(model, states, place, levels, root):
    """(levels, vocabulary) probabilities, where ``place`` is the root's and ``states`` are of all places before it.

    ``states`` are (length, hidden), or (length, heads, hidden) for heads that read other states each.

    A level whose head needs a state that does not exist has probabilities 0.
    """
    config, rows = model.leap_heads.config, []
    for level in range(1, levels + 1):
        head = next(i for i, offset in enumerate(config.offsets) if offset >= level + 1)
        source = place + level - config.offsets[head]  # this state's head predicts the token at place + level
        if source < 0:
            rows.append(torch.zeros(config.vocab_size))
            continue
        leap, embedding = model.leap_heads.heads[head - 1], model.get_input_embeddings().weight[root]
        z = states[source] if states.dim() == 2 else states[source, head - 1]
        z = through_blocks(leap, z, embedding, back=place - 1 - source)
        matrix = model.get_output_embeddings().weight if config.head_kind == "shared" else leap.unembed.weight
        drafted = list(range(config.vocab_size))
        if config.draft_vocab_size is not None:  # as the fixture `leap` chooses it
            drafted = list(range(3, 3 + 5 * config.draft_vocab_size, 5))
            matrix = matrix[drafted] if config.head_kind == "shared" else matrix
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        logits = matrix @ z if softcap is None else softcap * torch.tanh(matrix @ z / softcap)
        rows.append(torch.zeros(config.vocab_size).index_copy(0, torch.tensor(drafted), logits.softmax(-1)))
    return torch.stack(rows)


def check_drafts(model, inputs, plan, monkeypatch, seed=0, new=16):
    """Generate with branches of all kinds accepted, and compare what the heads would have drafted before every step."""
    length, rows = inputs["input_ids"].shape[1], len(inputs["input_ids"])
    kwargs = {"max_new_tokens": new, "do_sample": False}
    expected = stock(model, **inputs, **kwargs)
    rng, seen = random.Random(seed), []
    ranks = {(row, place): rng.choice([0, 0, 1, 2, None]) for row in range(rows) for place in range(length + new)}

    with oracle(expected, lambda row, place: ranks[row, place]) as acceptors:
        foretold = tree_builder.propose_candidates

        def recorded(model, window, levels, width, *_):
            lengths = [row.length for row in acceptors[-1].rows if not row.done]
            unfinished = [b for b, row in enumerate(acceptors[-1].rows) if not row.done]
            seen.append((dict(zip(unfinished, lengths)), propose_candidates(model, window, levels, width)))
            return foretold(model, window, levels, width)

        monkeypatch.setattr(tree_builder, "propose_candidates", recorded)
        monkeypatch.setattr(draft_module, "int8_linear", lambda *_: None)  # int8 heads are right but for a percent
        _, stats = decoded(model, **inputs, **kwargs, lmtp_tree=plan)
        monkeypatch.undo()

    mask = inputs.get("attention_mask", torch.ones(rows, length, dtype=torch.long))
    mask = torch.cat([mask, torch.ones(rows, new, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        with recorded_layers(model) as layers:
            hidden = model.base_model(expected, attention_mask=mask, position_ids=positions).last_hidden_state
        hidden = model.leap_heads.inputs(hidden, layers)
        for lengths, candidates in seen:
            for row, total in lengths.items():
                padding = int((mask[row] == 0).sum())
                levels, width = candidates.tokens.shape[1:]
                rows_expected = brute_force(
                    model, hidden[row, padding:], total - 1 - padding, levels, root=int(expected[row, total - 1])
                )
                best = rows_expected.topk(width)
                torch.testing.assert_close(candidates.probabilities[row], best.values, rtol=2e-3, atol=1e-6)
                for level in range(levels):
                    if best.values[level].sum():  # near ties may stand in either order
                        proposed = rows_expected[level, candidates.tokens[row, level]]
                        torch.testing.assert_close(proposed, best.values[level], rtol=2e-3, atol=1e-6)
                        assert len(set(candidates.tokens[row, level].tolist())) == width
    return seen, stats


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("heads", HEADS)
@torch.no_grad()
def test_candidates_are_the_heads_of_the_right_states(leap, geometry, heads, monkeypatch):
    model = leap(heads=GEOMETRIES[geometry] | HEADS[heads])
    seen, stats = check_drafts(model, {"input_ids": prompt(1, 7)}, TREES["dynamic"], monkeypatch)
    assert stats.tau > 1.3 and len(seen) == stats.steps
    offsets = model.leap_heads.config.offsets
    assert seen[0][1].tokens.shape[1] == offsets[-1] - 1


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("length", [1, 2])
@torch.no_grad()
def test_prompts_shorter_than_the_window(leap, geometry, length, monkeypatch):
    model = leap(heads=GEOMETRIES[geometry])
    seen, _ = check_drafts(model, {"input_ids": prompt(1, length)}, TREES["dynamic"], monkeypatch, new=9)
    offsets = model.leap_heads.config.offsets
    possible = seen[0][1].probabilities[0, :, 0] > 0  # of the first draft
    sources = [min(o for o in offsets if o >= level + 1) - level for level in range(1, offsets[-1])]
    assert possible.tolist() == [back <= length for back in sources]


@pytest.mark.parametrize(
    "architecture, heads, plan",
    [
        *itertools.product(["llama-tied", "mistral"], ["own", "newest token"], ["static", "dynamic"]),
        *itertools.product(["gemma3-softcap"], HEADS, ["static", "dynamic"]),
    ],
)
@torch.no_grad()
def test_rows_of_a_batch_have_windows_of_their_own(leap, architecture, heads, plan, monkeypatch):
    model = leap(architecture, heads=GEOMETRIES["stride 3"] | HEADS[heads])
    seen, _ = check_drafts(model, padded([2, 7, 1]), TREES[plan], monkeypatch)
    assert any(len(set(lengths.values())) > 1 for lengths, _ in seen)


@torch.no_grad()
def test_a_conversation_s_next_turn_starts_a_window_of_what_is_new(leap, monkeypatch):
    """States of the tokens in a given cache are gone; levels that need them have probability 0."""
    model = leap(heads=GEOMETRIES["stride 3"])
    first = stock(model, prompt(), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, prompt(1, 1, seed=1)], dim=1)  # 2 tokens are not in the cache
    drafts = []

    def recorded(*args):
        drafts.append(propose_candidates(*args))
        return drafts[-1]

    monkeypatch.setattr(tree_builder, "propose_candidates", recorded)
    kwargs = {"max_new_tokens": 9, "do_sample": False}
    output, _ = decoded(model, ids, past_key_values=first.past_key_values, lmtp_tree=TREES["dynamic"], **kwargs)
    assert torch.equal(output, stock(model, ids, **kwargs))
    # Stride 3 reads the states 2, 1, 0 places back, twice over.
    assert (drafts[0].probabilities[0, :, 0] > 0).tolist() == [False, True, True, False, True, True]


@torch.no_grad()
@pytest.mark.parametrize("heads", HEADS)
def test_int8_heads_propose_nearly_the_same(leap, heads, monkeypatch):
    """On a CPU the heads' matrices are read as int8, which may change near ties and nothing else."""
    model, drafts = leap(heads=HEADS[heads]), []

    def recorded(model, window, levels, width, *_):
        quick = propose_candidates(model, window, levels, width)
        with monkeypatch.context() as patch:
            patch.setattr(draft_module, "int8_linear", lambda *_: None)
            drafts.append((quick, propose_candidates(model, window, levels, model.config.vocab_size)))
        return quick

    monkeypatch.setattr(tree_builder, "propose_candidates", recorded)
    decoded(model, prompt(), max_new_tokens=6, do_sample=False, lmtp_tree=TREES["dynamic"])
    assert drafts
    assert not all(torch.equal(quick.probabilities, exact.probabilities[..., :3]) for quick, exact in drafts)
    for quick, exact in drafts:
        of_token = torch.zeros(*exact.tokens.shape[:2], model.config.vocab_size)
        of_token.scatter_(2, exact.tokens, exact.probabilities)
        torch.testing.assert_close(quick.probabilities, of_token.gather(2, quick.tokens), rtol=0.1, atol=1e-4)
        torch.testing.assert_close(quick.probabilities, exact.probabilities[:, :, :3], rtol=0.1, atol=1e-4)
