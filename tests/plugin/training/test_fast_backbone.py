"""Stage 1 on a CPU computes its frozen backbone by oneDNN."""

import pytest
from helpers import llamafactory_runs as runs
from torch import nn

from lmtp_factory.modeling.model import LeapModel


@pytest.mark.parametrize("stage, fast", [("lmtp1", True), ("lmtp2", False)])
def test_only_a_frozen_backbone_is_multiplied_by_onednn(
    stage, fast, llama, data, stage1, tmp_path, trainers, monkeypatch
):
    """A trained one needs gradients. After training all layers are as before."""
    seen, states = set(), LeapModel.final_hidden_states

    def look(self, **inputs):
        parts = {"backbone": self.base_model, "LM head": self.lm_head, "heads": self.leap_heads}
        for part, module in parts.items():
            layers = [layer for layer in module.modules() if type(layer) is nn.Linear]
            assert layers
            seen.update((part, "forward" in vars(layer)) for layer in layers)
        return states(self, **inputs)

    monkeypatch.setattr(LeapModel, "final_hidden_states", look)
    source = {"stage1_pretrained_path": str(stage1)} if stage == "lmtp2" else {"head_kind": "shared"}
    runs.train(
        llama, data, tmp_path, stage=stage, max_steps=2, val_size=6, eval_strategy="steps", eval_steps=1, **source
    )
    assert (("backbone", True) in seen) == fast
    assert not {("LM head", True), ("heads", True)} & seen
    assert not any("forward" in vars(layer) for layer in trainers[0].model.modules() if type(layer) is nn.Linear)
