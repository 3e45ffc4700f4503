"""The real SmolLM2-135M-Instruct on real prompts: what decoding with heads must not change."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmtp_factory import LMTPConfig, attach_heads, resources
from lmtp_factory.decoding import tree_builder
from lmtp_factory.decoding.draft import Candidates
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.tree_config import TreeConfig


pytestmark = pytest.mark.slow
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def model(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    return attach_heads(model, LMTPConfig(offsets=(2, 3, 6), head_kind="shared"))


@pytest.fixture(scope="module")
def inputs(smollm2):
    """Three chats, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    lines = (resources.folder("datasets") / "self_distilled_smollm2_heldout.jsonl").read_text().splitlines()[:3]
    chats = [[{"role": "user", "content": json.loads(line)["instruction"]}] for line in lines]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(chats, **options)


@pytest.fixture
def good_drafts(monkeypatch, model, inputs):
    """Drafts that are right in two of three levels, at any rank: what well trained heads would propose."""
    texts = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, lmtp_decode="off")
    mask = torch.ones_like(texts)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        known = model.base_model(input_ids=texts, attention_mask=mask, position_ids=positions).last_hidden_state
    generator = torch.Generator().manual_seed(0)

    def propose(model, window, levels, width, *_):
        tokens = torch.randint(model.config.vocab_size, (len(texts), levels, width), generator=generator)
        for row, state in enumerate(window.states[:, -1]):
            place = int((known[row] - state).norm(dim=-1).argmin())  # the state that the step starts from
            truth = texts[row, place + 2 : place + 2 + levels]
            for level, token in enumerate(truth):
                if torch.rand((), generator=generator) < 0.67:
                    tokens[row, level, torch.randint(width, (), generator=generator)] = token
        return Candidates(tokens, torch.full((len(texts), levels, width), 0.3))

    monkeypatch.setattr(tree_builder, "propose_candidates", propose)
    return texts


def test_greedy_is_stock_token_for_token(model, inputs, good_drafts):
    stats = DecodeStats()
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    output = model.generate(
        **inputs, **options, lmtp_tree=TreeConfig("dynamic", 24, width=2, always=True), lmtp_stats=stats
    )
    assert torch.equal(output, good_drafts)
    assert stats.tau > 1.5


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_a_seed_gives_stocks_sample(model, inputs, penalty):
    row = {name: tensor[:1] for name, tensor in inputs.items()}
    options = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": penalty}
    outputs = []
    for decode in ("off", "backward"):
        torch.manual_seed(7)
        outputs.append(
            model.generate(**row, **options, lmtp_decode=decode, lmtp_tree=TreeConfig("dynamic", 8, always=True))
        )
    assert torch.equal(*outputs)
