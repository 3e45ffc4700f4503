"""What `lmtp_factory.serving.vllm` and `lmtp-cli serve` refuse, without vLLM."""

import json
import sys
import types

import pytest
from helpers import tiny_models
from helpers.tiny_models import randomise_heads

from lmtp_factory import LMTPConfig, LMTPError, attach_heads
from lmtp_factory.cli import serve
from lmtp_factory.modeling.checkpoint import save_heads
from lmtp_factory.serving import vllm as ours


@pytest.fixture
def export(tmp_path):
    model = attach_heads(tiny_models.llama(), LMTPConfig(offsets=(2, 3, 6)))
    randomise_heads(model)
    save_heads(model.leap_heads, tmp_path / "lmtp")
    return tmp_path


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


def test_a_version_that_has_not_run_is_named(caplog):
    ours.check_version("0.32.1")
    assert not caplog.records
    ours.check_version("0.33.0")
    assert "not been run with vLLM 0.33.0" in caplog.text


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.32.0", "dev"])
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
        (["--num-speculative-tokens", "6"], "reach 5 tokens"),
    ],
)
def test_options_that_contradict_are_refused(export, options, words):
    with pytest.raises(LMTPError, match=words):
        serve.command_of(str(export), options)


def test_serving_needs_heads_and_vllm(export, tmp_path_factory, monkeypatch):
    with pytest.raises(LMTPError, match="no lmtp/ folder"):
        serve.command_of(str(tmp_path_factory.mktemp("plain")), [])
    monkeypatch.setattr(serve, "_vllm_version", lambda: None)
    with pytest.raises(LMTPError, match="not installed"):
        serve.command_of(str(export), [])
