"""Medusa's checkpoints: by each program's names, whole or a leap subset, and never as a pickle."""

import pytest
import torch
from helpers.third_party import medusa_tensors, third_party_logits, write_checkpoint
from safetensors.torch import load_file

from lmtp_factory import load_model
from lmtp_factory.cli import main


MEDUSA_FILE = "medusa_lm_head.safetensors"


@pytest.fixture(scope="module")
def heads(fitted):
    return fitted((2, 3, 4, 5, 6), layers=2)


@pytest.fixture
def config(base):
    # The published checkpoints say 2 heads and hold 5.
    return {"medusa_num_heads": 2, "medusa_num_layers": 2, "base_model_name_or_path": str(base)}


def command(checkpoint, output, *options):
    return main(["import", str(checkpoint), "--output", str(output), *map(str, options)])


def test_adjacent_heads(heads, config, base_model, tmp_path):
    tensors = medusa_tensors(heads)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tensors, config, MEDUSA_FILE)
    assert command(checkpoint, tmp_path / "out") == 0
    model = load_model(str(tmp_path / "out"))
    assert model.leap_heads.config.offsets == (1, 2, 3, 4, 5, 6)
    states = base_model.model(torch.arange(40, 60)[None]).last_hidden_state
    logits = model.leap_heads.logits(states, model.lm_head)
    assert len(logits) == 5
    for i in range(5):
        blocks = [(f"{i}.{j}.linear.weight", f"{i}.{j}.linear.bias") for j in range(2)]
        torch.testing.assert_close(logits[i], third_party_logits(tensors, states, blocks, f"{i}.2.weight"))


def test_medusa_heads_are_measured_as_adjacent(heads, config, rows_file, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", medusa_tensors(heads), config, MEDUSA_FILE)
    assert command(checkpoint, tmp_path / "out", "--text", rows_file) == 0
    assert "offsets 2,3,4,5,6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "offsets"),
    [
        (["--offsets", "3,5"], (3, 5)),
        (["--stride", 2], (3, 5)),
        (["--stride", 3], (4,)),
        (["--offsets", "2,3,6"], (2, 3, 6)),
    ],
)
def test_a_subset_of_medusa_heads_leaps(options, offsets, heads, config, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", medusa_tensors(heads), config, MEDUSA_FILE)
    assert command(checkpoint, tmp_path / "out", *options) == 0
    imported = load_model(str(tmp_path / "out")).leap_heads
    assert imported.config.offsets == (1, *offsets)
    assert len(imported.heads) == len(offsets)
    for head, offset in zip(imported.heads, offsets):
        theirs = heads.heads[offset - 2].state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in head.state_dict().items())


def vllm_tensors(heads, prefix):
    tensors = {}
    for i, head in enumerate(heads.heads):
        tensors |= {
            f"{prefix}blocks.{i}.layers.{j}.weight": b.leap_proj.weight.detach() for j, b in enumerate(head.blocks)
        }
        tensors[f"{prefix}lm_heads.{i}.weight"] = head.unembed.weight.detach()
    return tensors


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
def test_names_of_vllm_and_blocks_without_a_bias(prefix, heads, base, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", vllm_tensors(heads, prefix), {"num_heads": 5})
    assert command(checkpoint, tmp_path / "out", "--base", base) == 0
    written = load_file(tmp_path / "out" / "lmtp" / "model.safetensors")
    expected = heads.state_dict()
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, torch.zeros(32) if name.endswith("bias") else expected[name])


def test_a_model_with_its_heads(heads, config, tmp_path):
    tensors = medusa_tensors(heads, "medusa_head.") | {"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tensors, config, shards=2)
    assert command(checkpoint, tmp_path / "out") == 0
    written = load_file(tmp_path / "out" / "lmtp" / "model.safetensors")
    assert all(torch.equal(tensor, written[name]) for name, tensor in heads.state_dict().items())


def test_heads_that_read_the_lm_head(heads, config, base_model, tmp_path):
    tensors = {name: tensor for name, tensor in medusa_tensors(heads).items() if "linear" in name}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tensors, config, MEDUSA_FILE)
    assert command(checkpoint, tmp_path / "out") == 0
    model = load_model(str(tmp_path / "out"))
    assert model.leap_heads.config.head_kind == "shared"
    states = base_model.model(torch.arange(40, 60)[None]).last_hidden_state
    blocks = [(f"1.{j}.linear.weight", f"1.{j}.linear.bias") for j in range(2)]
    expected = third_party_logits(tensors | {"lm_head": base_model.lm_head.weight}, states, blocks, "lm_head")
    torch.testing.assert_close(model.leap_heads.logits(states, model.lm_head)[1], expected)


def test_heads_that_are_not_there_are_refused(heads, config, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", medusa_tensors(heads), config, MEDUSA_FILE)
    assert command(checkpoint, tmp_path / "out", "--offsets", "3,9") == 1
    assert f"asks for +9, but the heads of {checkpoint} predict 2,3,4,5,6 tokens ahead" in capsys.readouterr().err
    assert command(checkpoint, tmp_path / "out", "--stride", "6") == 1
    assert f"--stride 6 asks for +7, but {checkpoint} ends at +6" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Mischief:
    """What unpickles to a file that was not there."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_refused_unread(config, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", {"x": torch.ones(1)}, config)
    (checkpoint / "model.safetensors").unlink()
    torch.save({"0.0.linear.weight": Mischief(tmp_path / "harm")}, checkpoint / "medusa_lm_head.pt")
    assert command(checkpoint, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "a pickle such as medusa_lm_head.pt can run any code" in error
    assert "'medusa_lm_head.safetensors')\"" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "harm").exists()
    torch.load(checkpoint / "medusa_lm_head.pt", weights_only=False)
    assert (tmp_path / "harm").exists()  # so it would have been noticed


def test_the_advised_conversion_works(heads, config, tmp_path, capsys, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", {"x": torch.ones(1)}, config)
    (checkpoint / "model.safetensors").unlink()
    torch.save(medusa_tensors(heads), checkpoint / "medusa_lm_head.pt")
    assert command(checkpoint, tmp_path / "out") == 1
    code = capsys.readouterr().err.split('python -c "')[1].rstrip().rstrip('"')
    monkeypatch.chdir(checkpoint)
    exec(code, {})
    assert command(checkpoint, tmp_path / "out") == 0
    imported = load_model(str(tmp_path / "out")).leap_heads.state_dict()
    assert all(torch.equal(tensor, imported[name]) for name, tensor in heads.state_dict().items())
