"""Tau of evaluation text against decoding, and where a batch has its answers."""

import pytest
import torch
from accelerate import Accelerator
from helpers import tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.tree_config import TreeConfig
from lmtp_factory.evaluation.self_generated import generate_greedy, self_generated_rows
from lmtp_factory.modeling.layer_states import recorded
from lmtp_factory.plugin.training.packing import pack
from lmtp_factory.plugin.training.replayed_tau import ReplayedTau, answers_in


PROMPTS = [[30, 40, 50], [60, 61, 62, 63, 64, 65], [70]]
NEW_TOKENS = 24


@pytest.fixture(scope="module", params=["state", "state_token", "layers"])
def model(request, tmp_path_factory):
    """Untrained heads on tied embeddings: the model repeats itself, so that drafts are often right."""
    path = tiny_models.save_qwen3(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return attach_heads(model, LMTPConfig(offsets=(2, 3, 6), head_inputs=request.param))


@pytest.fixture(scope="module")
def documents(model):
    rows = list(self_generated_rows(model, PROMPTS, NEW_TOKENS))
    return [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in rows]


def replayed(model, *batches):
    """Tau and acceptance by position of the batches."""
    tau = ReplayedTau(model)
    for batch in batches:
        with recorded(model) as layers:
            hidden = model.final_hidden_states(**{key: batch[key] for key in batch if key != "labels"})
        tau.add(batch, model.leap_heads.inputs(hidden, layers))
    return tau.pop(Accelerator(cpu=True), "eval_")


def packed(documents):
    """All documents in one row."""
    return pack(documents, [list(range(len(documents)))], pad_token_id=0)


def alone(document):
    return {key: torch.tensor([value]) for key, value in document.items()}


def test_it_is_the_tau_of_decoding_with_a_chain(model, documents):
    stats = DecodeStats()
    for prompt in PROMPTS:
        tree = TreeConfig("chain", 6, always=True)
        generate_greedy(model, prompt, NEW_TOKENS, lmtp_stats=stats, lmtp_tree=tree)
    found = replayed(model, *map(alone, documents))
    assert stats.tau > 1.2
    assert found["eval_tau"] == pytest.approx(stats.tau, rel=1e-6)
    assert found["eval_tau"] == pytest.approx(1 + sum(found[f"eval_acceptance_{i}"] for i in range(1, 6)))


def test_packed_and_padded_documents_have_the_tau_of_documents_alone(model, documents):
    found = replayed(model, *map(alone, documents))
    assert replayed(model, packed(documents)) == pytest.approx(found)
    length = max(len(document["input_ids"]) for document in documents)
    for side in ("left", "right"):
        batch = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        for key, fill in batch.items():
            rows = torch.full((len(documents), length), fill)
            for row, document in zip(rows, documents):
                values = document.get(key, [1] * len(document["input_ids"]))
                row[(slice(length - len(values), None) if side == "left" else slice(len(values)))] = torch.tensor(
                    values
                )
            batch[key] = rows
        if side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        assert replayed(model, batch) == pytest.approx(found), side


def test_a_window_does_not_look_into_the_document_before(model, documents):
    """The first states of a document are missing, not those of another one."""
    other = {"input_ids": [5, 6, 7, 8], "labels": [-100] * 4}
    assert replayed(model, packed([other, *documents])) == pytest.approx(replayed(model, packed(documents)))


def test_every_turn_is_an_answer(model, documents):
    labels = torch.tensor([[-100, 1, 2, -100, -100, 3, 4, 5], [9, 9, -100, -100, -100, -100, -100, 9]])
    assert list(answers_in({"labels": labels})) == [
        (0, slice(0, 8), range(1, 3)),
        (0, slice(0, 8), range(5, 8)),
        (1, slice(0, 8), range(0, 2)),
        (1, slice(0, 8), range(7, 8)),
    ]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 0]])
    assert list(answers_in({"labels": labels, "position_ids": positions})) == [
        (0, slice(0, 5), range(1, 3)),
        (0, slice(5, 8), range(0, 3)),
        (1, slice(0, 7), range(0, 2)),
        (1, slice(7, 8), range(0, 1)),
    ]


def test_without_an_answer_there_is_no_tau(model):
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[-100, -100, 5]])}
    assert replayed(model, batch) == {} and replayed(model) == {}
