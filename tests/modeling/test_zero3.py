"""Sharded weights: what looks at a model gathers them layer by layer and leaves them sharded."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_models

from lmtp_factory.modeling.zero3 import _units, ensure_backward_hook, fetch_together, gathered, gathered_as_it_runs


_ZERO3 = """
import os, sys, deepspeed, torch
from helpers import tiny_models
from transformers.integrations import HfDeepSpeedConfig
from lmtp_factory import LMTPConfig, LMTPError, attach_heads
from lmtp_factory.modeling.packing_probe import keeps_documents_apart
deepspeed.init_distributed("gloo")
settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})


def sharded(make, place):
    folder, made = f"{sys.argv[1]}/{place}-{torch.distributed.get_rank()}", make()
    made.save_pretrained(folder)
    model = type(made).from_pretrained(folder)
    check(model)
    return model


def check(model):
    assert all(p.numel() == 0 for p in model.parameters() if hasattr(p, "ds_id")), "not sharded"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


for make, apart in ((tiny_models.llama, True), (tiny_models.falcon_h1, False)):
    model = sharded(make, make.__name__)
    attach_heads(model, LMTPConfig(num_heads=1, head_kind="shared"), stage=1)
    check(model)
    assert keeps_documents_apart(model) == apart, make
    check(model)

broken = sharded(tiny_models.llama, "broken")
broken.model.layers[1].mlp.down_proj.forward = None
for model in (sharded(lambda: tiny_models.granite(8.0), "granite"), broken):
    try:
        attach_heads(model, stage=2)
    except LMTPError as error:
        print(error)
    check(model)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# Threads of the process group that DeepSpeed still holds abort the interpreter's teardown now and then.
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.distributed
def test_sharded_weights(tmp_path):
    (tmp_path / "program.py").write_text(_ZERO3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parents[1]
    places = os.pathsep.join([str(tests.parent), str(tests)])
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": places, "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
            env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        said, errors = rank.communicate(timeout=240)
        assert rank.returncode == 0, errors[-4000:]
        assert "GraniteForCausalLM changes its LM head's logits" in said
        assert "LlamaForCausalLM cannot run on 7 tokens" in said


def test_without_zero3_nothing_is_touched():
    model = tiny_models.llama()
    hidden = torch.zeros(2, 32)
    with gathered(model.parameters()), gathered_as_it_runs(model):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert ensure_backward_hook(hidden) is hidden and not hidden.requires_grad
    fetch_together(model, model.parameters())
    assert not any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def test_a_layer_is_gathered_whole_and_everything_else_by_itself():
    model = tiny_models.llama()
    units = list(_units(model))
    whole = dict(units)
    assert len(whole) == len(units)
    for layer in model.model.layers:
        assert whole[layer] == list(layer.parameters())
        assert not any(module in whole for module in layer.modules() if module is not layer)
    assert whole[model.lm_head] == [model.lm_head.weight]
    counted = [id(parameter) for _, parameters in units for parameter in parameters]
    assert sorted(counted) == sorted(id(parameter) for parameter in model.parameters())
