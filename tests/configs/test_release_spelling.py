"""YAML files as the authors' release spells them run as they are, paths and what the machine forces aside."""

import pytest
import yaml
from helpers.recipes import SMALL, STAND_INS, check_losses, heads_in, stand_in, train_and_export, weights_in


STAGE1 = """
trust_remote_code: true
mtp_type: lmtp1
num_heads: 3
stage1_pretrained_path: saves/full/stage1
stage: sft
do_train: true
finetuning_type: full
dataset: tiny
template: qwen
cutoff_len: 1024
overwrite_cache: true
output_dir: saves/full/stage1
logging_steps: 10
save_strategy: 'no'
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
learning_rate: 1.0e-3
num_train_epochs: 1
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
STAGE2 = """
trust_remote_code: true
mtp_type: lmtp2
num_heads: 3
head_weight: 0.1
stage1_pretrained_path: saves/full/stage1
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 32
lora_alpha: 16
lora_target: all
train_lm_head: false
dataset: tiny
template: qwen
cutoff_len: 1024
overwrite_cache: true
output_dir: saves/lora/stage2_0.02
logging_steps: 10
save_strategy: "no"
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
learning_rate: 1.0e-5
num_train_epochs: 3
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
MERGE = """
adapter_name_or_path: saves/lora/stage2_0.02
template: qwen
trust_remote_code: true
export_dir: saves/merged/stage2_0.02
export_size: 5
export_device: cpu
export_legacy_format: false
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("release")
    base = STAND_INS["qwen2.5-3b"].save(directory / "base")
    return train_and_export(directory, base, *map(yaml.safe_load, (STAGE1, STAGE2, MERGE)))


def test_stage1_names_its_own_empty_output(trained):
    assert weights_in(trained.stage1) == {"lmtp/model.safetensors"}
    check_losses(trained.stage1, trained.stage2)


def test_stage2_goes_on_from_it(trained):
    assert weights_in(trained.stage2) == {"adapter_model.safetensors", "lmtp/model.safetensors"}
    before, after = heads_in(trained.stage1), heads_in(trained.stage2)
    assert all(0 < (after[name] - before[name]).abs().max() < 1e-4 for name in before)


def test_merge_has_no_heads(trained):
    assert weights_in(trained.export) == {"model.safetensors"}


@pytest.mark.parametrize(("mtp_type", "stage"), [("lmtp1", 1), ("lmtp2", 2), ("vanilla", None)])
def test_mtp_type_decides_the_stage(mtp_type, stage, trained, tmp_path):
    from llamafactory.hparams import get_train_args

    keys = yaml.safe_load(STAGE2) | {"mtp_type": mtp_type, "output_dir": str(tmp_path)}
    keys["stage1_pretrained_path"] = str(trained.stage1)
    keys["finetuning_type"] = "full" if stage == 1 else "lora"
    finetuning_args = get_train_args(stand_in(keys, trained.base, trained.base.parent / "data") | SMALL)[3]
    assert (finetuning_args.stage, finetuning_args.lmtp_stage) == ("sft", stage)
