"""Greedy output against stock ``generate``, token for token, with drafts of every quality."""

import copy
import inspect

import pytest
import torch
from helpers import tiny_models
from helpers.decoding import GEOMETRIES, TREES, assert_as_stock, decoded, enlarge_weights, oracle, padded, prompt, stock
from helpers.tiny_models import randomise_heads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoProcessor,
    DynamicCache,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from lmtp_factory import LMTPError, attach_heads
from lmtp_factory.decoding.tree_config import CostCurve, TreeConfig
from lmtp_factory.modeling import heads_of


ARCHITECTURES = ("llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma3-text", "gemma3-softcap", "gemma3", "gpt2")
GREEDY = {"do_sample": False}


def mixed_ranks(row: int, place: int) -> int | None:
    """The right token as the first, second or third candidate or not at all, in an order without a period to speak of."""
    return (0, 1, None, 0, 2, 0, 0)[(place * place + 3 * row) % 7]


def check_drafts(model, inputs, plan, rank=mixed_ranks, new=28, **kwargs):
    """With the heads' own drafts, and with those of an oracle that is right as often as ``rank`` says."""
    kwargs |= {"max_new_tokens": new, "lmtp_tree": plan} | GREEDY
    expected, own = assert_as_stock(model, **inputs, **kwargs)
    with oracle(expected, rank):
        ours, stats = decoded(model, **inputs, **kwargs)
    assert ours.tolist() == expected.tolist()
    assert own.tokens == stats.tokens == expected[:, -new:].numel()
    return stats


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(leap, architecture, attention):
    """Longer than the sliding windows of 16; a batch with padding, and a row on its own."""
    model = leap(architecture, attention)
    stats = check_drafts(model, padded([11, 3, 7]), TREES["dynamic"])
    assert stats.tau > 1.3
    stats = check_drafts(model, {"input_ids": prompt()}, TREES["static"])
    assert stats.tau > 1.3


@pytest.mark.parametrize("plan", TREES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry_and_kind_of_tree(leap, geometry, plan):
    model = leap("mistral", heads=GEOMETRIES[geometry])
    stats = check_drafts(model, padded([5, 9]), TREES[plan], new=20)
    assert len(stats.accepted) < model.leap_heads.config.offsets[-1]


@pytest.mark.parametrize("heads", [{"head_kind": "shared"}, {"head_layers": 2, "num_heads": 1}])
def test_kinds_of_heads(leap, heads):
    check_drafts(leap(heads=heads), {"input_ids": prompt()}, TREES["dynamic"])


@pytest.mark.parametrize("plan", TREES)
@pytest.mark.parametrize("rows", [1, 2])
def test_forward_is_the_same_with_plain_steps_between(leap, rows, plan):
    """F-MTP fills the window by plain steps: stride 3 takes two between drafts."""
    model, inputs = leap("mistral", heads=GEOMETRIES["stride 3"]), padded([8, 5][:rows])
    stats = check_drafts(model, inputs, TREES[plan], lmtp_decode="forward")
    assert stats.strategy == "forward"
    right = oracle(stock(model, **inputs, max_new_tokens=28, **GREEDY))
    with right:
        _, stats = decoded(
            model, **inputs, max_new_tokens=28, lmtp_tree=TREES["chain"], lmtp_decode="forward", **GREEDY
        )
    # 27 tokens after the prefill's: two plain steps, then 5 at once, over and over.
    assert stats.steps == rows * 12 and sum(stats.accepted) == rows * 15


@pytest.mark.parametrize("architecture", ["llama", "gemma3-text"])
def test_a_cache_made_without_a_config(leap, architecture):
    """It keeps everything in sliding layers too, so that the mask has to hide it; steps of one node need one as well."""
    model = leap(architecture)
    for plan in (*TREES.values(), TreeConfig("chain", 1)):
        kwargs = {"max_new_tokens": 28} | GREEDY
        expected = stock(model, prompt(), past_key_values=DynamicCache(), **kwargs)
        with oracle(expected, mixed_ranks):
            ours, _ = decoded(model, prompt(), past_key_values=DynamicCache(), lmtp_tree=plan, **kwargs)
        assert ours.tolist() == expected.tolist()


@pytest.mark.parametrize("architecture", ["mistral", "gemma3-text"])
@pytest.mark.parametrize("window", [2, 3, 5])
def test_branches_longer_than_the_sliding_window(leap, architecture, window):
    """Their last nodes do not see their first ones."""
    model = leap(architecture, heads={"offsets": (2, 3, 8)}, sliding_window=window)
    for plan in (TreeConfig("chain", 8, always=True), TREES["dynamic"]):
        for inputs in ({"input_ids": prompt()}, padded([9, 4])):
            stats = check_drafts(model, inputs, plan, rank=lambda row, place: 0 if place % 17 else None)
    assert len(stats.accepted) > 2 and check_drafts(model, inputs, TreeConfig("chain", 8, always=True)).tau > 1.3


def test_several_sequences_of_one_prompt(leap):
    check_drafts(leap("qwen2"), padded([4, 6]), TREES["dynamic"], num_return_sequences=1)
    model, kwargs = leap("qwen2"), {"num_return_sequences": 3, "do_sample": True, "top_k": 1, "max_new_tokens": 12}
    output, _ = assert_as_stock(model, **padded([4, 6]), **kwargs)  # sampling from one token is greedy
    assert output[:3].unique(dim=0).shape[0] == 1


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "gemma3"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_embeddings_for_a_prompt(leap, architecture, cache):
    model, ids = leap(architecture), prompt(2, 18)
    embedded = model.get_input_embeddings()(ids).detach()
    for inputs in ({"inputs_embeds": embedded}, {"inputs_embeds": embedded, "input_ids": ids}):
        check_drafts(model, inputs, TREES["dynamic"], new=16, cache_implementation=cache)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("plan", ["chain", "dynamic"])
def test_prompts_of_one_token(leap, architecture, plan):
    check_drafts(leap(architecture), {"input_ids": prompt(1, 1)}, TREES[plan])
    check_drafts(leap(architecture), padded([1, 4, 2]), TREES[plan])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_given_positions(leap, architecture):
    ids = prompt(2, 8)
    positions = torch.arange(8)[None] + torch.tensor([[0], [5]])
    shifted = check_drafts(leap(architecture), {"input_ids": ids, "position_ids": positions}, TREES["dynamic"])
    assert shifted.tau > 1.3
    one, _ = assert_as_stock(leap(architecture), ids, position_ids=positions * 2, max_new_tokens=8, **GREEDY)
    assert one.tolist() != assert_as_stock(leap(architecture), ids, max_new_tokens=8, **GREEDY)[0].tolist()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3-text", "gemma3", "gpt2"])
@pytest.mark.parametrize("plan", TREES)
def test_a_static_cache_of_one_size(leap, architecture, plan):
    """Not compiled on a CPU, but its trees always have the same number of nodes."""
    model = leap(architecture)
    stats = check_drafts(model, padded([9, 4]), TREES[plan], new=26, cache_implementation="static")
    assert stats.nodes == stats.steps * TREES[plan].nodes


def test_an_image_before_the_text(leap, tmp_path):
    """Its tokens see each other in both directions, in the prompt's forward alone."""
    model = copy.deepcopy(leap("gemma3"))
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # fresh models have zeros there
    processor = AutoProcessor.from_pretrained(tiny_models.save_gemma3(tmp_path))
    image = Image.effect_mandelbrot((28, 28), (-2, -2, 2, 2), 40).convert("RGB")
    text = f"{processor.boi_token} the frog leaps over"
    inputs = processor(text=text, images=image, return_tensors="pt")
    with_image = check_drafts(model, inputs, TREES["dynamic"])
    assert with_image.tau > 1.3
    blank = dict(inputs) | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
    outputs = [stock(model, **values, max_new_tokens=10, **GREEDY).tolist() for values in (inputs, blank)]
    assert outputs[0] != outputs[1]  # else the image would not matter


def test_positions_of_three_kinds(leap):
    """Qwen2-VL counts time, height and width, and its text goes on after an image at a place of its own."""
    size, image = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}, 395
    config = Qwen2VLConfig(
        text_config={
            **size, "vocab_size": 400, "intermediate_size": 64, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
        image_token_id=image, video_token_id=396, vision_start_token_id=397, vision_end_token_id=398,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    enlarge_weights(model)
    randomise_heads(attach_heads(model))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.cat([torch.tensor([[397] + [image] * 4 + [398]]), prompt(1, 5)], dim=1)
    picture = {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # since transformers 5.3
        inputs["mm_token_type_ids"] = (ids == image).long()
    assert check_drafts(model, inputs | picture, TREES["dynamic"]).tau > 1.3
    assert check_drafts(model, padded([9, 4]), TREES["dynamic"]).tau > 1.3


def test_heads_that_overflow_cost_speed_alone(leap):
    model = copy.deepcopy(leap("mistral"))
    for broken in (float("nan"), float("inf")):
        with torch.no_grad():
            heads_of(model).heads[1].blocks[0].leap_proj.bias[3] = broken
        for plan in TREES.values():
            assert_as_stock(model, **padded([9, 4]), max_new_tokens=12, lmtp_tree=plan, **GREEDY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_after_it_had_generated(leap, dtype):
    model = copy.deepcopy(leap())
    assert_as_stock(model, prompt(), max_new_tokens=4, **GREEDY)
    model.to(dtype)
    if dtype == torch.float64:
        assert_as_stock(model, prompt(), max_new_tokens=12, **GREEDY)
    else:  # near ties may differ
        assert decoded(model, prompt(), max_new_tokens=12, **GREEDY)[1].tokens == 12


# Drafts that know the answer.


@pytest.mark.parametrize("kind", ["chain", "dynamic"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_perfect_draft_reaches_as_far_as_the_heads(leap, geometry, kind):
    """tau is the reach: that many levels of the geometry, the last token of a step being the model's own."""
    model = leap(heads=GEOMETRIES[geometry])
    reach = model.leap_heads.config.offsets[-1]
    new = 1 + 4 * reach
    expected = stock(model, **padded([6, 3]), max_new_tokens=new, **GREEDY)
    with oracle(expected):
        ours, stats = decoded(
            model,
            **padded([6, 3]),
            max_new_tokens=new,
            lmtp_tree=TreeConfig(kind, 2 + 3 * reach, width=3, always=True),
            **GREEDY,
        )
    assert ours.tolist() == expected.tolist()
    if kind == "chain":  # a dynamic tree of random probabilities need not be deep enough
        assert stats.tau == reach and stats.steps == 8 and stats.acceptance() == [1.0] * (reach - 1)
    else:
        assert 1.5 < stats.tau <= reach


def forwards(right: list[bool], levels: int) -> list[int]:
    """Tokens that each step of one row adds. ``right``: whether the draft for a place is; the prefill adds place 0."""
    steps, place = [], 1
    while place < len(right):
        added = 1
        while added <= levels and place + added < len(right) and right[place + added - 1]:
            added += 1
        steps.append(added)
        place += added
    return steps


corruptions = st.lists(st.sampled_from([0, 0, 0, 0, 1, 2, 3, None]), min_size=5, max_size=40)


@given(patterns=st.lists(corruptions, min_size=1, max_size=3), data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3-text"])
def test_any_mixture_of_right_and_wrong_tokens(leap, architecture, patterns, data):
    """Long branches, branches through any rank, and rows that get ahead of each other by any number of tokens."""
    plan = TREES[data.draw(st.sampled_from(sorted(TREES)))]
    geometry = GEOMETRIES[data.draw(st.sampled_from(sorted(GEOMETRIES)))]
    new, seed = data.draw(st.integers(1, 34)), data.draw(st.integers(0, 99))
    model, lengths = leap(architecture, heads=geometry), [7, 3, 10][: len(patterns)]
    inputs, kwargs = padded(lengths), {"max_new_tokens": new} | GREEDY
    if data.draw(st.booleans()):
        kwargs["cache_implementation"] = "static"
    expected = stock(model, **inputs, **kwargs)
    with oracle(expected, lambda row, place: patterns[row][place % len(patterns[row])], seed):
        ours, stats = decoded(model, **inputs, lmtp_tree=plan, **kwargs)
    assert ours.tolist() == expected.tolist()
    if plan.kind == "chain":
        levels = min(plan.nodes, geometry_reach(model)) - 1
        counted = []
        for pattern in patterns:
            first = max(lengths)
            counted += forwards([pattern[place % len(pattern)] == 0 for place in range(first, first + new)], levels)
        assert stats.steps == len(counted)
        assert stats.accepted == [
            sum(added > level for added in counted) for level in range(1, max(counted, default=1))
        ]


@pytest.mark.parametrize("lengths", [[9], [9, 4, 7]], ids=["one row", "padded rows"])
def test_small_trees_at_the_end_of_a_buffer(leap, lengths):
    """A branch of a tree that was cut is kept behind it: no column beyond those that the tree had is written."""
    model, inputs = leap("llama"), padded(lengths)
    # Cuts to 3 nodes, and the heads reach 6 levels.
    steep = {nodes * len(lengths): cost for nodes, cost in ((1, 1.0), (2, 1.05), (3, 1.1), (4, 3.0), (64, 60.0))}
    tree = TreeConfig("dynamic", 16, width=3, cost=CostCurve(steep), always=True)
    stats = check_drafts(model, inputs, tree, rank=lambda row, place: (0, 1)[(place + row) % 3 == 1], new=230)
    assert stats.tau > 1.3 and stats.nodes < 4 * stats.steps


def geometry_reach(model) -> int:
    return model.leap_heads.config.offsets[-1]


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_ranks_beyond_the_draft_vocabulary_are_refused(kind, leap):
    model = leap(heads={"head_kind": kind, "draft_vocab_size": 4})
    tree = TreeConfig("static", 2, ((), (6,)), always=True)
    with pytest.raises(LMTPError, match="down to rank 6, but the heads draft 4 tokens"):
        decoded(model, prompt(), max_new_tokens=5, lmtp_tree=tree)
    assert_as_stock(model, prompt(), max_new_tokens=12, lmtp_tree=TREES["dynamic"], do_sample=False)
