"""A heads export in transformers alone: neither lmtp_factory nor LLaMA-Factory."""

import os
import subprocess
import sys

import pytest
import tiny
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, attach_heads, load_model
from lmtp_factory.decoding.plan import Conditions, TreePlan, write_plan
from lmtp_factory.files import HEADS_FOLDER, TREE_FILE


PROGRAM = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"lmtp_factory", "llamafactory"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
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
assert len(forwards) < 24, len(forwards)
always = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
assert torch.equal(stock, always.generate(ids, **options))
assert torch.equal(stock, always.generate(inputs=ids, lmtp_decode="off", **options))
assert not any(name.split(".")[0] == "lmtp_factory" for name in sys.modules)
print("forwards", len(forwards))
"""


@pytest.fixture
def export(tmp_path):
    path = tiny.tiny_qwen3(tmp_path / "export")
    attach_heads(AutoModelForCausalLM.from_pretrained(path), LMTPConfig(num_heads=2)).save_pretrained(path)
    write_plan(TreePlan("chain", 4), path / HEADS_FOLDER, Conditions("cpu", "float32", True), measured={})
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


def test_every_module_that_is_imported_is_there(export):
    """transformers follows the imports of generate.py only one level deep where the export is a local directory."""
    folder = export / "custom_generate"
    files = {path.stem for path in folder.glob("*.py")}
    named = {
        line.split()[1][1:] for line in (folder / "generate.py").read_text().splitlines() if line.startswith("from .")
    }
    assert named == files - {"generate"}
    for path in folder.glob("*.py"):
        assert "from .." not in path.read_text()


def test_our_own_loader_takes_its_own_decoder(export, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = load_model(str(export), trust_remote_code=True)
    assert "generate" not in vars(model)
    assert type(model).generate.__module__ == "lmtp_factory.modeling.lmtp"


def test_a_measured_tree_travels(export, tmp_path):
    load_model(str(export)).save_pretrained(tmp_path / "again")
    kept = (tmp_path / "again" / HEADS_FOLDER / TREE_FILE).read_text()
    assert kept == (export / HEADS_FOLDER / TREE_FILE).read_text()
    assert (tmp_path / "again" / "custom_generate" / "generate.py").is_file()
