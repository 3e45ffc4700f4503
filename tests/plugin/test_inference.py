"""Models that are prepared for an export: an LM head that tuning has separated from the embeddings stays separate."""

import pytest
import torch
from accelerate import cpu_offload
from helpers import tiny_models

from lmtp_factory.plugin.inference import _untie_tuned_lm_head


def qwen_vl():
    """Its text configuration does not say whether the embeddings are tied."""
    model = tiny_models.qwen_vl(tie=True)
    assert not hasattr(model.config.get_text_config(), "tie_word_embeddings")
    return model


BUILDERS = [lambda: tiny_models.llama(tie=True), tiny_models.gemma3, qwen_vl]


def tune(model):
    weight = model.get_output_embeddings().weight
    model.get_output_embeddings().weight = torch.nn.Parameter(weight.detach() + 1)


@pytest.mark.parametrize("build", BUILDERS, ids=["llama", "gemma3", "qwen_vl"])
def test_a_tuned_lm_head_is_exported_beside_the_embeddings(build, tmp_path, lines):
    model = build()
    _untie_tuned_lm_head(model)
    assert model.config.tie_word_embeddings and not lines
    tune(model)
    _untie_tuned_lm_head(model)
    assert not any(
        getattr(config, "tie_word_embeddings", False) for config in (model.config, model.config.get_text_config())
    )
    assert lines == [
        "The tuned LM head differs from the embeddings now: the export is saved with tie_word_embeddings: false."
    ]
    model.save_pretrained(tmp_path / "saved")
    again = tiny_models.load(tmp_path / "saved")
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("tuned", [False, True])
def test_offloaded_weights_are_compared_by_value(tuned):
    """`export_device: auto` may offload both, which leaves two parameters without data, tied or not."""
    model = tiny_models.llama(tie=True)
    if tuned:
        tune(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    lm_head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert lm_head.weight.is_meta and lm_head.weight is not embeddings.weight
    _untie_tuned_lm_head(model)
    assert model.config.tie_word_embeddings == (not tuned)
    assert lm_head.weight.is_meta and embeddings.weight.is_meta
