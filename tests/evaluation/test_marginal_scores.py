"""The scores of marginalisation and of heads at the same positions, against the model's own predictions."""

import pytest
import torch
from helpers import tiny_data, tiny_models
from helpers.decoding import enlarge_weights
from helpers.tiny_models import randomise_heads
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from lmtp_factory import LMTPConfig, LMTPError, attach_heads
from lmtp_factory.decoding.continuations import CachedText
from lmtp_factory.evaluation import marginal_scores
from lmtp_factory.evaluation.marginal import marginals
from lmtp_factory.evaluation.marginal_scores import (
    check_marginal,
    scorable_positions,
    score_marginal,
    spread_evenly,
)
from lmtp_factory.evaluation.report import marginal_table, print_marginal
from lmtp_factory.evaluation.scoring import read_rows
from lmtp_factory.modeling.layer_states import recorded
from lmtp_factory.modeling.losses.targets import IGNORE_INDEX
from lmtp_factory.modeling.objective import Objective


KS = (1, 4)


@pytest.fixture
def rows(tmp_path):
    return read_rows(tiny_data.save_token_rows(tmp_path / "rows.jsonl"))


def leap(rows, build=tiny_models.llama, **heads):
    """A model with heads. Outputs are changed so that it and its heads are right now and then, not by chance alone."""
    model = build()
    enlarge_weights(model)
    config = LMTPConfig(**heads)
    size = config.draft_vocab_size
    attach_heads(model, config, draft_tokens=range(20, 20 + size) if size else None)
    randomise_heads(model)
    write_hits(model, rows)
    return model


@torch.no_grad()
def write_hits(model, rows):
    """Write into most places of the outputs what the model expects there, and into some what its heads at +2, +3 do."""
    heads = marginal_scores._Heads(model)
    for prompt, output in rows:
        for place in range(len(output)):
            ids = torch.tensor([prompt + output])[:, : len(prompt) + place]
            with recorded(model) as layers:
                hidden = model.base_model(input_ids=ids).last_hidden_state
            states = model.leap_heads.inputs(hidden, layers)[0]  # (length, ...)
            offset = {3: 2, 4: 3}.get(place % 5)
            if offset is None:
                output[place] = int(model(ids).logits[0, -1].argmax())
            elif offset in heads.offsets:
                output[place] = int(heads.predict(offset, states[-offset, None], ids[0, 1 - offset, None]))


def test_positions_have_all_their_targets_in_the_output(rows):
    """Outputs of 9, 2 and 14 tokens behind prompts of 3, 5 and 4."""
    found = scorable_positions(rows)
    assert found == [(0, t) for t in range(2, 9)] + [(2, t) for t in range(3, 15)]
    assert scorable_positions([([7], [1, 2, 3])]) == [(0, 0)]
    assert scorable_positions([([], [1, 2, 3, 4])]) == [(0, 0)]
    with pytest.raises(LMTPError, match="No output of --rows has 3 tokens"):
        scorable_positions(rows[1:2])


def test_some_positions_are_spread_evenly(rows):
    found = scorable_positions(rows)
    assert spread_evenly(found, 1000) == found
    some = spread_evenly(found, 5)
    places = [found.index(position) for position in some]
    assert places == [1, 5, 9, 13, 17]


@pytest.mark.parametrize("at_once", [512, 10], ids=["one forward", "several forwards"])
def test_accuracies_are_those_of_the_sums(rows, at_once, monkeypatch):
    monkeypatch.setattr(marginal_scores, "_NODES", at_once)
    model = leap(rows)
    positions = scorable_positions(rows)
    report = score_marginal(model, rows, positions, KS, with_heads=False)
    hits, masses, next_hits = torch.zeros(2, 2), torch.zeros(2, 2), 0
    for row, t in positions:
        ids = torch.tensor(rows[row][0] + rows[row][1])
        next_hits += int(model(ids[None, : t + 1]).logits[0, -1].argmax() == ids[t + 1])
        for number, marginal in enumerate(marginals(model, CachedText(model, ids), torch.tensor([t]), KS)):
            hits[:, number] += marginal.probabilities[0].argmax(-1) == ids[t + 2 + number]
            masses[:, number] += marginal.masses[0]
    assert (report.positions, report.heads, report.reads_token) == (len(positions), {}, False)
    assert report.next_token == pytest.approx(next_hits / len(positions))
    for number, score in enumerate(report.marginal):
        assert score.accuracies == pytest.approx((hits[number] / len(positions)).tolist())
        assert score.masses == pytest.approx((masses[number] / len(positions)).tolist(), rel=1e-4)
    assert hits.min() > 0 and hits.max() < len(positions)
    assert [(score.k, score.forwards, score.rows) for score in report.marginal] == [
        (1, (1, 2), (1, 2)),
        (4, (1, 2), (4, 8)),
    ]
    # Two texts, up to their last positions; 4 nodes a position at +2, at +3 4 or the 5 of two different cuts.
    assert report.forwards == (2 + 2 * 2 if at_once == 512 else 2 + 2 * (4 + 6))
    assert 8 * len(positions) <= report.rows - (9 + 15) <= 9 * len(positions)


HEADS = {
    "own": {"offsets": (2, 3, 6), "head_kind": "own"},
    "shared, draft vocabulary": {"offsets": (2, 3), "head_kind": "shared", "draft_vocab_size": 150},
    "own, draft vocabulary": {"offsets": (2, 3), "head_kind": "own", "draft_vocab_size": 150},
    "conditioned": {"offsets": (2, 3), "head_inputs": "state_token", "head_block": "mlp"},
    "layers": {"offsets": (2, 3), "head_inputs": "layers"},
    "stride 2": {"num_heads": 2, "stride": 2},
    "none near": {"offsets": (4, 5)},
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.gemma3_text], ids=["llama", "gemma3"])
def test_heads_are_scored_at_the_same_positions(rows, kind, build):
    """As the training loss counts hits, with all other targets masked."""
    model = leap(rows, build, **HEADS[kind])
    offsets, positions = model.leap_heads.config.offsets, scorable_positions(rows)
    report = score_marginal(model, rows, positions, [1])
    expected = {}
    for offset in {2, 3} & set(offsets):
        hits = 0
        for index, (prompt, output) in enumerate(rows):
            ids = torch.tensor([prompt + output])
            targets = [t + offset for row, t in positions if row == index]
            labels = torch.full_like(ids, IGNORE_INDEX)
            labels[0, targets] = ids[0, targets]
            objective = Objective.of_evaluation(len(offsets) - 1)
            with torch.no_grad():
                hits += int(
                    model.eval().leap_loss(labels, objective=objective, input_ids=ids).hits[offsets.index(offset)]
                )
        expected[offset] = hits / len(positions)
    assert report.heads == pytest.approx(expected)
    assert all(0 < accuracy < 1 for accuracy in expected.values()) and len(expected) == len({2, 3} & set(offsets))
    assert report.reads_token == (kind == "conditioned")


def test_a_model_whose_forward_takes_no_tree_is_refused(rows):
    config = OpenAIGPTConfig(vocab_size=400, n_embd=32, n_layer=2, n_head=4)
    model = attach_heads(OpenAIGPTLMHeadModel(config).eval())
    with pytest.raises(
        LMTPError, match=r"^--marginal needs tree-masked forwards \(.*leave it out for OpenAIGPTLMHeadModel\.$"
    ):
        check_marginal(model, rows)


def test_what_is_printed(rows, capsys):
    """One line a K, the heads below; what makes a number hard to read is said."""
    model = leap(rows, offsets=(2, 5), head_inputs="state_token")
    positions = scorable_positions(rows)
    report = score_marginal(model, rows, spread_evenly(positions, 6), KS)
    lines = marginal_table({"mine": report}).splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["LM", "K", "K", "heads"]
    assert f"{100 * report.marginal[1].masses[1]:.1f}%" in lines[4]
    assert lines[5].split() == ["mine", "heads", f"{100 * report.heads[2]:.1f}%", "0", "0"]
    print_marginal({"mine": report}, len(positions))
    printed = capsys.readouterr().out
    assert f"(6, evenly spread, of {len(positions)})" in printed
    assert "its heads also read the token at +1" in printed
    assert "nearly its own greedy answer" not in printed
    print_marginal({"mine": score_marginal(model, *greedy_rows(model), KS)}, 1)
    assert "nearly its own greedy answer, which K = 1 follows by construction" in capsys.readouterr().out


def greedy_rows(model):
    """A row that the model wrote greedily, and its positions. K = 1 is right at all of them."""
    ids = torch.tensor([[21, 22, 23]])
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    rows = [(ids[0, :3].tolist(), ids[0, 3:].tolist())]
    positions = scorable_positions(rows)
    report = score_marginal(model, rows, positions, [1], with_heads=False)
    assert report.next_token == 1 and report.marginal[0].accuracies == (1, 1)
    return rows, positions
