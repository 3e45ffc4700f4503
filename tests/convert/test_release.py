"""The L-MTP release's checkpoints: the same logits afterwards, offsets asked for or measured, and what is refused."""

import json

import pytest
import torch
from helpers import tiny_data, tiny_models
from helpers.third_party import release_tensors, third_party_logits, write_checkpoint
from safetensors.torch import load_file

from lmtp_factory import LeapHeads, LMTPConfig, load_model
from lmtp_factory.cli import main
from lmtp_factory.modeling.checkpoint import base_fingerprint


CONFIG = {"head_num_layers": 1, "head_type": "lmtp", "n_head": 5, "skip_token": 3}  # as untrue as the release's own


@pytest.fixture(scope="module")
def heads(fitted):
    return fitted((3, 5, 7))


def command(checkpoint, base, output, *options):
    return main(["import", str(checkpoint), "--base", str(base), "--output", str(output), *map(str, options)])


def test_logits_are_the_checkpoint_s_own(heads, base, base_model, tmp_path):
    tensors = release_tensors(heads)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tensors, CONFIG)
    assert command(checkpoint, base, tmp_path / "out", "--stride", 2) == 0
    model = load_model(str(tmp_path / "out"))
    states = base_model.model(torch.arange(40, 60)[None]).last_hidden_state
    logits = model.leap_heads.logits(states, model.lm_head)
    assert len(logits) == 3
    for i in range(3):
        blocks = [(f"heads.heads.{i}.resblock.0.l_proj.weight", f"heads.heads.{i}.resblock.0.l_proj.bias")]
        expected = third_party_logits(tensors, states, blocks, f"heads.heads.{i}.lm_head.weight")
        torch.testing.assert_close(logits[i], expected)
        assert not torch.allclose(logits[i], model.lm_head(states), atol=1e-2)
    config = model.leap_heads.config
    assert config.offsets == (1, 3, 5, 7)
    assert (config.hidden_size, config.vocab_size) == (32, len(tiny_data.build_tokenizer()))
    assert (config.base_model, config.tokenizer_fingerprint) == (str(base), base_fingerprint(str(base)))
    assert config.tokenizer_fingerprint is not None


def test_shards_prefixes_and_dtype(heads, base, tmp_path):
    heads = type(heads)(heads.config).to(torch.bfloat16)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", release_tensors(heads, "base_model.c_model."), shards=3)
    assert command(checkpoint, base, tmp_path / "out", "--offsets", "2,4,9") == 0
    written = load_file(tmp_path / "out" / "lmtp" / "model.safetensors")
    expected = heads.state_dict()
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name])
    config = json.loads((tmp_path / "out" / "lmtp" / "config.json").read_text())
    assert (config["offsets"], config["dtype"]) == ([1, 2, 4, 9], "bfloat16")


def test_one_block_under_several_names(fitted, base, tmp_path):
    """The release repeats one block, and safetensors keeps one of its names."""
    tensors = release_tensors(fitted((3, 5)))
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tensors, CONFIG | {"head_num_layers": 2})
    assert command(checkpoint, base, tmp_path / "out", "--stride", 2) == 0
    written = load_file(tmp_path / "out" / "lmtp" / "model.safetensors")
    assert len(written) == 2 * 5
    for i in range(2):
        for j in range(2):
            ours = written[f"heads.{i}.blocks.{j}.leap_proj.weight"]
            assert torch.equal(ours, tensors[f"heads.heads.{i}.resblock.0.l_proj.weight"])


def test_base_model_named_by_the_checkpoint(heads, base, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", release_tensors(heads), CONFIG | {"model_name": str(base)})
    assert main(["import", str(checkpoint), "--output", str(tmp_path / "out"), "--stride", "2"]) == 0
    assert load_model(str(tmp_path / "out")).leap_heads.config.base_model == str(base)


def test_output_may_be_the_base_model(heads, tmp_path):
    base = tiny_models.save_llama(tmp_path / "base")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", release_tensors(heads))
    assert command(checkpoint, base, base, "--stride", 2) == 0
    assert load_model(str(base)).leap_heads.config.num_heads == 3


@pytest.mark.parametrize("offsets", [(3, 5, 7), (4, 7, 10), (2, 3, 6)])
def test_offsets_are_measured_on_rows(offsets, fitted, base, rows_file, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", release_tensors(fitted(offsets)), CONFIG)
    assert command(checkpoint, base, tmp_path / "out", "--text", rows_file) == 0
    assert load_model(str(tmp_path / "out")).leap_heads.config.offsets == (1, *offsets)
    printed = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(printed) if line.split()[:2] == ["+1", "+2"])
    for offset, line in zip(offsets, printed[header + 1 :]):
        assert line.split()[2:][offset - 1].endswith("*")  # after "head" and its number
        assert line.count("*") == 1


def test_offsets_are_measured_on_plain_text(fitted, base, tmp_path):
    text = "".join(chr(ord("!") + (17 * i + i // 7) % 90) for i in range(1500))
    ids = tiny_data.build_tokenizer()(text).input_ids
    windows = [ids[i : i + 256] for i in range(0, len(ids) - 255, 256)]
    (tmp_path / "text.txt").write_text(text)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", release_tensors(fitted((3, 5, 7), windows)))
    assert command(checkpoint, base, tmp_path / "out", "--text", tmp_path / "text.txt") == 0
    assert load_model(str(tmp_path / "out")).leap_heads.config.offsets == (1, 3, 5, 7)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "does not say how far its heads leap"),
        (["--stride", "0"], "--stride is 0, but heads leap by 1 token or more"),
        (["--offsets", "3,3,7"], "--offsets is 3,3,7, but the extra heads' offsets have to rise"),
        (["--offsets", "1,3,5"], "--offsets is 1,3,5, but the extra heads' offsets have to rise"),
        (["--offsets", "3,5"], "--offsets 3,5 is for 2 heads, but {checkpoint} has 3"),
        (["--text", "absent.txt"], "--text absent.txt is no file"),
        (["--format", "medusa", "--stride", "2"], "holds no heads, no tensor like 0.0.linear.weight (Medusa)"),
    ],
)
def test_options_are_refused_before_the_base_model_is_looked_at(options, sentence, heads, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", release_tensors(heads), CONFIG)
    assert command(checkpoint, tmp_path / "no-base", tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert sentence.format(checkpoint=checkpoint) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


FIRST = "heads.heads.0.resblock.0.l_proj."


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        (f"{FIRST}weight", None, "lacks a part of its heads, in our names heads.0.blocks.0.leap_proj.weight"),
        (f"{FIRST}bias", None, "lacks a part of its heads, in our names heads.0.blocks.0.leap_proj.bias"),
        ("heads.heads.1.lm_head.weight", None, "lacks a part of its heads, in our names heads.1.unembed.weight"),
        (f"{FIRST}weight", torch.zeros(32, 31), "have hidden size 31, but {base} has 32: write --base"),
        (
            "heads.heads.0.lm_head.weight",
            torch.zeros(512, 32),
            "have vocabulary size 512, but {base} has {vocab}: write",
        ),
        (
            "heads.heads.2.lm_head.weight",
            torch.zeros(512, 32),
            "heads.heads.2.lm_head.weight of {checkpoint} has shape",
        ),
        (f"other.{FIRST}bias", torch.zeros(32), "holds one part of a head twice"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, tensor, sentence, heads, base, tmp_path, capsys):
    tensors = release_tensors(heads)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tensors, CONFIG)
    assert command(checkpoint, base, tmp_path / "out", "--stride", 2) == 1
    error = capsys.readouterr().err
    assert sentence.format(checkpoint=checkpoint, base=base, vocab=len(tiny_data.build_tokenizer())) in error
    assert not (tmp_path / "out").exists()


def test_heads_read_states_of_the_embeddings_width(tmp_path, capsys):
    """An OPT-350M projects hidden states to a narrower LM head."""
    base = tiny_models.save(tiny_models.opt(), tmp_path / "opt")
    vocab_size = len(tiny_data.build_tokenizer())
    for width in (16, 32):
        heads = LeapHeads(LMTPConfig(offsets=(3,), hidden_size=width, vocab_size=vocab_size))
        checkpoint = write_checkpoint(tmp_path / f"checkpoint{width}", release_tensors(heads))
        refused = command(checkpoint, base, tmp_path / f"out{width}", "--stride", 2)
        assert refused == (width == 32)
    assert f"have hidden size 32, but {base} has 16" in capsys.readouterr().err
    assert load_model(str(tmp_path / "out16")).leap_heads.config.hidden_size == 16


def test_damaged_and_missing_files_are_refused(heads, base, tmp_path, capsys):
    tensors = release_tensors(heads)
    whole = write_checkpoint(tmp_path / "whole", tensors)
    weights = (whole / "model.safetensors").read_bytes()
    (whole / "model.safetensors").write_bytes(weights[:-100])
    assert command(whole, base, tmp_path / "out", "--stride", 2) == 1
    assert "is truncated or damaged" in capsys.readouterr().err

    sharded = write_checkpoint(tmp_path / "sharded", tensors, shards=2)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert command(sharded, base, tmp_path / "out", "--stride", 2) == 1
    assert "model-00002-of-00002.safetensors is missing: copy the checkpoint again" in capsys.readouterr().err

    (sharded / "config.json").write_text("{")
    assert command(sharded, base, tmp_path / "out", "--stride", 2) == 1
    assert "config.json is damaged" in capsys.readouterr().err

    assert command(tmp_path / "absent", base, tmp_path / "out", "--stride", 2) == 1
    assert "is no directory, and as a hub id it does not load" in capsys.readouterr().err


def test_a_base_model_that_is_none_is_refused(heads, base, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", release_tensors(heads), CONFIG)
    assert main(["import", str(checkpoint), "--output", str(tmp_path / "out"), "--stride", "2"]) == 1
    assert "does not name its base model: write --base" in capsys.readouterr().err
    assert command(checkpoint, tmp_path / "absent", tmp_path / "out", "--stride", 2) == 1
    assert f"The base model {tmp_path / 'absent'} cannot be loaded" in capsys.readouterr().err


def test_what_lies_at_the_output_is_not_spoilt(heads, base, rows_file, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", release_tensors(heads), CONFIG)
    assert command(checkpoint, base, tmp_path / "out", "--stride", 2) == 0
    assert command(checkpoint, base, tmp_path / "out", "--stride", 3) == 1
    assert "has an lmtp/ already: name another --output" in capsys.readouterr().err
    assert load_model(str(tmp_path / "out")).leap_heads.config.stride == 2
    assert command(checkpoint, base, checkpoint, "--stride", 2) == 1
    assert "holds a model that is not the heads' base" in capsys.readouterr().err
    assert command(checkpoint, base, rows_file, "--stride", 2) == 1
    assert f"--output {rows_file} is a file" in capsys.readouterr().err


def test_heads_that_cannot_be_measured_are_refused(heads, fitted, base, base_model, rows_file, tmp_path, capsys):
    def refusal(name, tensors, text=rows_file):
        checkpoint = write_checkpoint(tmp_path / name, tensors, CONFIG)
        assert command(checkpoint, base, tmp_path / "out", "--text", text) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    trained = release_tensors(heads)
    assert "The heads predict +7, +5, +3, but the offsets of leap heads rise" in refusal(
        "order", release_tensors(reverse(heads))
    )
    assert "The heads predict +1, but the offsets of leap heads rise" in refusal("next", release_tensors(fitted((1,))))

    copies = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    copies |= {f"heads.heads.{i}.lm_head.weight": base_model.lm_head.weight.detach().clone() for i in range(3)}
    assert "right only where the LM head makes the same guess" in refusal("copies", copies)

    torch.manual_seed(0)
    noise = {name: torch.randn_like(tensor) for name, tensor in trained.items()}
    error = refusal("noise", noise)
    assert "do not tell what the heads predict (no stride fits clearly best, and head" in error
    assert "write --stride or --offsets" in error

    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:3]))
    assert "positions with 13 tokens after them, but measuring takes 256" in refusal("few", trained, few)

    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"prompt_ids": "1 2", "output_ids": "9999"}\n')
    assert "holds token ids beyond the vocabulary" in refusal("foreign", trained, foreign)

    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a frog leaps"}\n')
    assert "line 1 is no row of lmtp-cli distill" in refusal("other", trained, other)


def reverse(heads):
    reversed_heads = type(heads)(heads.config)
    reversed_heads.heads = torch.nn.ModuleList(reversed(heads.heads))
    return reversed_heads
