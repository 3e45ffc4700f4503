"""custom_generate/ of a heads export: transformers alone decodes with the heads, where this package is installed."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import tiny_models
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import check_python_requirements

import lmtp_factory
from lmtp_factory import LMTPConfig, LMTPError, attach_heads, load_model
from lmtp_factory.decoding.machine import processor_name
from lmtp_factory.decoding.tree_choice import Conditions, write_tree
from lmtp_factory.decoding.tree_config import TreeConfig
from lmtp_factory.export.custom_generate import FOLDER, write_custom_generate
from lmtp_factory.files import HEADS_FOLDER, TREE_FILE


PROGRAM = """
import importlib.machinery, sys

ABSENT = {"llamafactory", "peft", "deepspeed", "accelerate", "datasets", "psutil", "matplotlib"}
find_spec = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *args: None if name.split(".")[0] in ABSENT else find_spec(name, *args)
)
import torch
from transformers import AutoModelForCausalLM

path = sys.argv[1]
ids = torch.tensor([[30, 40, 50], [60, 61, 62]])
options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)
model = AutoModelForCausalLM.from_pretrained(path)
stock = model.generate(ids, **options)
forwards = []
model.model.register_forward_hook(lambda *_: forwards.append(1))
ours = model.generate(ids, custom_generate=path, trust_remote_code=True, **options)
assert torch.equal(stock, ours), (stock, ours)
assert type(model).generate.__module__.startswith("lmtp_factory.")
always = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
assert torch.equal(stock, always.generate(ids, **options))
assert torch.equal(stock, always.generate(inputs=ids, lmtp_decode="off", **options))
print("forwards", len(forwards))
"""


@pytest.fixture
def export(tmp_path):
    path = tiny_models.save_qwen3(tmp_path / "export")
    attach_heads(AutoModelForCausalLM.from_pretrained(path), LMTPConfig(num_heads=2)).save_pretrained(path)
    write_custom_generate(path)
    here = Conditions("cpu", "float32", True, processor_name(), torch.get_num_threads())
    write_tree(TreeConfig("chain", 4), path / HEADS_FOLDER, here, measured={})
    return path


def test_custom_generate_needs_transformers_only(export, tmp_path):
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hub"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(export)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "forwards" in result.stdout


def test_the_folder_holds_a_loader_and_its_requirement(export):
    folder = export / FOLDER
    assert sorted(path.name for path in folder.iterdir()) == ["generate.py", "requirements.txt"]
    *comments, requirement = (folder / "requirements.txt").read_text().splitlines()
    assert requirement == f"lmtp_factory>={lmtp_factory.__version__}"
    assert all(line.startswith("# ") for line in comments)  # transformers skips these lines
    check_python_requirements(folder)
    for name in ("generate.py", "requirements.txt"):  # the package is in no index, so its name alone installs nothing
        assert "pip install --no-deps PATH" in (folder / name).read_text()
        assert "pip install --no-deps lmtp_factory" not in (folder / name).read_text()


def test_a_version_that_is_too_old_is_told_where_the_package_is(export, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")
    with pytest.raises(ImportError, match=rf"lmtp_factory>={lmtp_factory.__version__} \(installed: 0.0.1\)"):
        check_python_requirements(export / FOLDER)


def test_a_model_without_heads_is_told(tmp_path):
    path = tiny_models.save_qwen3(tmp_path / "plain")
    write_custom_generate(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(LMTPError, match="has no lmtp/ folder"):
        model.generate(torch.tensor([[5]]), custom_generate=str(path), trust_remote_code=True)


def test_load_model_needs_no_loader(export, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = load_model(str(export), trust_remote_code=True)
    assert "generate" not in vars(model)
    assert type(model).generate.__module__ == "lmtp_factory.decoding.mixin"


def test_a_measured_tree_travels(export, tmp_path):
    load_model(str(export)).save_pretrained(tmp_path / "again")
    kept = (tmp_path / "again" / HEADS_FOLDER / TREE_FILE).read_text()
    assert kept == (export / HEADS_FOLDER / TREE_FILE).read_text()
    assert not (tmp_path / "again" / FOLDER).exists()  # only an export that asks for it
