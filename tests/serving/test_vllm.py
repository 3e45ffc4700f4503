"""The proposer, the wrapped method and `lmtp-cli serve` on stand-ins of vLLM."""

import json
import sys
import types
from types import SimpleNamespace

import numpy
import pytest
import torch
from helpers import tiny_models
from helpers.serving import Target
from helpers.tiny_models import randomise_heads
from transformers import AutoConfig, AutoModelForCausalLM

from lmtp_factory import LMTPConfig, LMTPError, attach_heads, load_model
from lmtp_factory.cli import serve
from lmtp_factory.decoding.draft import Window, propose_candidates
from lmtp_factory.serving import vllm as ours


@pytest.fixture
def export(tmp_path):
    model = attach_heads(
        AutoModelForCausalLM.from_pretrained(tiny_models.save_llama(tmp_path)),
        LMTPConfig(offsets=(2, 3, 6), head_inputs="state_token"),
    )
    randomise_heads(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def vllm_config(folder, length=5):
    parallel = SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1)
    config = AutoConfig.from_pretrained(folder)
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(folder), hf_config=config, dtype=torch.float32, enable_sleep_mode=False),
        speculative_config=SimpleNamespace(num_speculative_tokens=length),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        parallel_config=parallel,
        lora_config=None,
    )


@pytest.fixture
def engine(monkeypatch):
    """Modules of a vLLM whose runner's method can be chosen."""

    def build(version, method):
        runner = types.ModuleType("vllm.v1.worker.gpu_model_runner")
        runner.GPUModelRunner = type("GPUModelRunner", (), {"propose_draft_token_ids": method})
        package = types.ModuleType("vllm")
        package.__version__ = version
        for name in ("vllm.v1", "vllm.v1.worker"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "vllm", package)
        monkeypatch.setitem(sys.modules, runner.__name__, runner)
        return runner.GPUModelRunner

    return build


def method(self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, sample_hidden_states=None):
    return "stock"


class Proposer(ours.LeapProposer):
    def __init__(self):
        pass

    def draft(self, runner, scheduled, sampled, hidden):
        return scheduled, sampled, hidden


def test_only_our_proposer_is_given_hidden_states(engine):
    runner = engine("0.32.4", method)
    ours.wrap_runner()
    wrapped = runner.propose_draft_token_ids
    ours.wrap_runner()
    assert runner.propose_draft_token_ids is wrapped
    instance = runner()
    instance.drafter = object()
    assert instance.propose_draft_token_ids("scheduled", [[1]], None, "hidden") == "stock"
    instance.drafter = Proposer()
    assert instance.propose_draft_token_ids("scheduled", [[1]], None, "hidden") == ("scheduled", [[1]], "hidden")


def test_a_proposer_drafts_what_our_own_decoding_drafts(engine, export):
    engine("0.32.0", method)
    model = load_model(str(export))
    proposer = ours.LeapProposer(vllm_config(export))
    proposer.load_model(Target(model))
    ids = torch.tensor([[5, 9, 30, 31, 40, 41, 50]])
    states = model.model(input_ids=ids).last_hidden_state[0]
    batch = SimpleNamespace(req_ids=["a"], num_computed_tokens_cpu=numpy.array([0]))
    runner = SimpleNamespace(input_batch=batch, requests={"a": object()})
    step = SimpleNamespace(
        num_scheduled_tokens={"a": 7}, scheduled_spec_decode_tokens={}, num_spec_tokens_to_schedule=5
    )
    (chain,) = proposer.draft(runner, step, [[60]], states)
    window = Window.of_prompt(states[None], [7], 3)
    window.roots = torch.tensor([60])
    assert chain == propose_candidates(model, window, 5, width=1).tokens[0, :, 0].tolist()
    step.num_spec_tokens_to_schedule = 2  # vLLM may ask for less
    assert proposer.draft(runner, step, [[60]], states) == [chain[:2]]
    assert proposer.draft(runner, step, [[]], states) == [[]]


def test_heads_of_another_model_are_refused(engine, export):
    engine("0.32.0", method)
    config = vllm_config(export)
    config.model_config.hf_config.vocab_size += 1
    with pytest.raises(LMTPError, match="vocabulary size"):
        ours.LeapProposer(config)
    with pytest.raises(LMTPError, match="reach 5 tokens"):
        ours.LeapProposer(vllm_config(export, length=6))


@pytest.mark.parametrize("version", ["0.31.9", "dev"])
def test_another_version_is_refused_by_name(engine, version):
    runner = engine(version, method)
    with pytest.raises(LMTPError, match=f"vLLM {version} is installed.* 0.32 and 0.33 only"):
        ours.wrap_runner()
    assert runner.propose_draft_token_ids is method


def test_another_seam_is_refused(engine):
    runner = engine("0.32.0", lambda self, scheduler_output, hidden_states: None)
    with pytest.raises(LMTPError, match="takes self, scheduler_output, hidden_states"):
        ours.wrap_runner()
    with pytest.raises(AttributeError):
        _ = runner.propose_draft_token_ids.of_lmtp_factory


def test_vllms_own_call_never_serves_without_drafts():
    with pytest.raises(LMTPError, match="without hidden states"):
        Proposer().propose([[1]], None, None, slot_mappings=None)


def test_the_command_line(export, monkeypatch):
    monkeypatch.setattr(serve, "_vllm_version", lambda: "0.32.0")
    command = serve.command_of(str(export), ["--port", "8000", "--num-speculative-tokens", "3", "--dtype=float32"])
    place = command.index("--speculative-config")
    assert json.loads(command[place + 1]) == {
        "model": f"{ours.LeapProposer.__module__}.{ours.LeapProposer.__qualname__}",
        "num_speculative_tokens": 3,
    }
    assert command[place + 2 :] == ["--port", "8000", "--dtype=float32"]
    command = serve.command_of(str(export), [])
    assert json.loads(command[command.index("--speculative-config") + 1])["num_speculative_tokens"] == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--speculative-config", "{}"], "writes --speculative-config itself"),
        (["--model=other"], "writes --model itself"),
        (["-sc", "{}"], "writes -sc itself"),
        (["--speculative_config", "{}"], "writes --speculative-config itself"),
        (["--speculative-config.method", "ngram"], "writes --speculative-config itself: leave .*method out"),
        (["--num-speculative-tokens", "6"], "reach 5 tokens"),
    ],
)
def test_options_that_contradict_are_refused(export, options, words, monkeypatch):
    monkeypatch.setattr(serve, "_vllm_version", lambda: "0.32.0")
    with pytest.raises(LMTPError, match=words):
        serve.command_of(str(export), options)


def test_serving_needs_heads_and_vllm(export, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(serve, "_vllm_version", lambda: "0.32.0")
    with pytest.raises(LMTPError, match="no lmtp/ folder"):
        serve.command_of(str(tmp_path_factory.mktemp("plain")), [])
    monkeypatch.setattr(serve, "_vllm_version", lambda: None)
    with pytest.raises(LMTPError, match="not installed"):
        serve.command_of(str(export), [])
