"""Commands, saved arguments and errors."""

import json
import sys

import pytest
import yaml
from helpers import llamafactory_runs as runs
from helpers.processes import python, started_ahead

from lmtp_factory.plugin.seams.webui.runner import refusal_first
from lmtp_factory.plugin.stages import STAGE_LABELS
from lmtp_factory.plugin.webui.fields import ALL_FIELDS


pytestmark = pytest.mark.xdist_group("runner")  # its programs are started ahead, once


STAGE1, STAGE2 = STAGE_LABELS
SFT = "Supervised Fine-Tuning"


def arguments(board, stage, **values):
    return board.engine.runner._parse_train_args(board.data(stage, **values))


def command(board, stage, **values):
    (update,) = board.engine.runner.preview_train(board.data(stage, **values))
    return update[board.component("train.output_box")]


def ours(args):
    return {key: value for key, value in args.items() if key in ALL_FIELDS}


def test_empty_fields_are_left_out(board, folder):
    assert ours(arguments(board, STAGE1)) == {"warmup_ratio": 0.1}
    assert ours(arguments(board, STAGE2)) == {"warmup_ratio": 0.1}
    assert ours(arguments(board, SFT)) == {}
    assert "--stage lmtp1" in command(board, STAGE1)
    assert not set(command(board, SFT).split()) & {f"--{key}" for key in ALL_FIELDS}


def test_what_is_filled_in_reaches_the_command(board, folder):
    filled = dict(
        train__num_heads=2, train__leap_stride=1, train__head_kind="shared", train__head_layers=2, train__head_block="mlp",
        train__head_inputs="state_token",
        train__draft_vocab_size=64, train__head_decay=0.8,
        train__warmup_ratio=0.2, train__hidden_cache_dir="cache", train__stage1_pretrained_path="saves/x",
        train__head_weight=0, train__head_learning_rate=0.0001, train__train_lm_head=True,
    )  # fmt: skip
    shared = dict(
        num_heads=2, leap_stride=1, head_kind="shared", head_layers=2, head_block="mlp", head_inputs="state_token",
        draft_vocab_size=64, head_decay=0.8, warmup_ratio=0.2
    )  # fmt: skip
    assert ours(arguments(board, STAGE1, **filled)) == shared | {"hidden_cache_dir": "cache"}
    stage2 = {
        "stage1_pretrained_path": "saves/x",
        "head_weight": 0,
        "head_learning_rate": 0.0001,
        "train_lm_head": True,
    }
    assert ours(arguments(board, STAGE2, **filled)) == shared | stage2
    text = command(board, STAGE2, **filled)
    for key, value in (shared | stage2).items():
        assert f"--{key} {value} " in text
    assert ours(arguments(board, SFT, **filled)) == {}


def test_warmup_steps_and_extra_arguments_win(board, folder):
    assert "warmup_ratio" not in arguments(board, STAGE1, train__warmup_steps=20)
    args = arguments(board, STAGE1, train__extra_args='{"num_heads": 5}', train__num_heads=2)
    assert args["num_heads"] == 5


def test_stage_1_packs_its_batches_unless_told_how(board, folder):
    assert "packing" not in arguments(board, STAGE1)
    assert arguments(board, STAGE1, train__packing=True)["packing"] is True
    assert arguments(board, STAGE2)["packing"] is False


def test_a_warm_up_chosen_as_checkpoint_is_no_model(board, folder):
    heads = folder / "saves" / "Custom" / "full" / "warm" / "lmtp"
    heads.mkdir(parents=True)
    (heads / "model.safetensors").touch()
    chosen = dict(top__finetuning_type="full", top__checkpoint_path="warm")
    evaluation = dict(eval__dataset=["tiny"], eval__output_dir="scores", eval__max_samples="10")
    data = board.data(STAGE2, **chosen) | board.evaluation_data(**chosen, **evaluation)
    for parse in (board.engine.runner._parse_train_args, board.engine.runner._parse_eval_args):
        args = parse(data)
        assert args["model_name_or_path"] == "some/model"
        assert args["stage1_pretrained_path"] == "saves/Custom/full/warm"


@pytest.mark.parametrize("stage", [STAGE1, STAGE2])
def test_a_command_is_what_training_parses(board, folder, stage, llama, data, no_model_loads):
    from llamafactory.hparams import get_train_args
    from llamafactory.webui.common import save_cmd

    args = arguments(
        board, stage, top__model_path=str(llama), top__template="qwen", train__dataset_dir=str(data),
        top__finetuning_type="full", train__compute_type="fp32", train__leap_offsets="2,3", train__head_weight=0.2,
    )  # fmt: skip
    with open(save_cmd(args), encoding="utf-8") as file:
        parsed = get_train_args(yaml.safe_load(file))[3]
    assert parsed.lmtp_stage == int(args["stage"][-1])
    assert parsed.leap_offsets == "2,3"


def test_bad_values_are_refused_before_anything_starts(board, folder, monkeypatch):
    import gradio

    monkeypatch.setattr(gradio, "Warning", lambda message: None)
    for language in ("en", "zh", "ru", "ko", "ja"):
        text = command(board, STAGE1, train__leap_offsets="6,3", top__lang=language)
        assert "6" in text and "llamafactory-cli" not in text
    assert "llamafactory-cli" in command(board, SFT, train__leap_offsets="6,3")


def test_saved_arguments_come_back(board, folder, monkeypatch):
    import gradio

    monkeypatch.setattr(gradio, "Warning", lambda message: None)
    runner = board.engine.runner
    runner.save_args(board.data(STAGE2, train__num_heads=2, train__train_lm_head=True, train__dataset=["a", "b"]))
    loaded = runner.load_args("en", "saved.yaml")
    assert loaded[board.component("train.num_heads")] == 2
    assert loaded[board.component("train.train_lm_head")] is True
    assert loaded[board.component("train.leap_stride")] is None
    assert loaded[board.component("train.dataset")] == ["a", "b"]
    assert loaded[board.component("train.training_stage")] == STAGE2


def test_plain_arguments_load_without_the_plugin_and_old_ones_with_it(board, folder):
    board.engine.runner.save_args(board.data(SFT, train__num_heads=2))
    with_plugin = yaml.safe_load((folder / "llamaboard_config" / "saved.yaml").read_text())
    program = """
import json, sys
from llamafactory.webui import interface
from llamafactory.webui.runner import Runner
engines = []
class Engine(interface.Engine):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        engines.append(self)
interface.Engine = Engine
blocks = interface.create_ui()
runner, manager = engines[0].runner, engines[0].manager
loaded = runner.load_args("en", "saved.yaml")
data = {component: component.value for component in next(f for f in blocks.fns.values() if f.name == "save_args").inputs}
fixed = {"top.lang": "en", "top.model_name": "Custom", "top.model_path": "m", "train.dataset": ["tiny"],
         "train.output_dir": "run", "train.config_path": "old.yaml"}
runner.save_args(data | {manager.get_elem_by_id(id): value for id, value in fixed.items()})
print(json.dumps([len(loaded), "lmtp_factory.plugin.hooks" in sys.modules]))
"""
    environment = {"LMTP_FACTORY_DISABLE": "1"}
    result = runs.cli(sys.executable, "-c", program, **environment)
    assert json.loads(result.stdout.splitlines()[-1]) == [len(with_plugin) + 1, False]
    loaded = board.engine.runner.load_args("en", "old.yaml")
    assert len(loaded) == len(with_plugin) + 1
    assert not any(board.component(f"train.{key}") in loaded for key in ALL_FIELDS)


def test_a_refusal_comes_first():
    log = "Failed. Exit code: 1\n\n```\nTraceback\n[rank0]: lmtp_factory.errors.LMTPError: Write this.\n```\n"
    assert refusal_first(log, "en") == f"**L-MTP cannot run like this:** Write this.\n\n{log}"
    assert refusal_first("Failed.", "en") == "Failed."


def test_a_refusal_of_an_earlier_run_is_not_shown_first(board, tmp_path, monkeypatch):
    """LLaMA-Factory 0.9.6 appends the output of each run in a directory to one log, and shows its end."""
    monkeypatch.chdir(tmp_path)
    runner, refusal = board.engine.runner, "lmtp_factory.errors.LMTPError: Write this.\n"
    data = board.data(STAGE1)
    log = runner._log(data, do_train=True)
    log.parent.mkdir(parents=True)
    log.write_text(refusal)
    runner._initialize(data, do_train=True, from_preview=False)
    with log.open("a") as file:
        file.write("out of memory\n")
    assert runner._written(data, True, log.read_text()) == "out of memory\n"
    with log.open("a") as file:
        file.write(refusal)
    shown = log.read_text()
    assert refusal_first(shown, "en", runner._written(data, True, shown)).startswith(
        "**L-MTP cannot run like this:** Write"
    )


def test_a_real_refusal_is_found(llama, data, tmp_path):
    args = runs.arguments(llama, data, tmp_path / "out", finetuning_type="lora")
    result = runs.cli("train", runs.write_yaml(tmp_path / "x.yaml", args), check=False)
    first = refusal_first(result.stderr, "en").splitlines()[0]
    assert "Stage 1 trains only the heads" in first and first.endswith("frozen).")


@pytest.fixture(scope="module")
def board_that_does_not_fit(request, tmp_path_factory):
    """Boards in processes of their own, whose Train tab is edited before it is extended."""

    def run(edit):
        program = f"""
import os
import lmtp_factory.plugin.hooks as hooks
os.chdir({str(tmp_path_factory.mktemp("board"))!r})
extend = hooks._extend
def edited(seam, module):
    if seam.name == "llamafactory.webui.components.train":
        upstream = module.create_train_tab
        {edit}
        extend(seam, module)
        if module.create_train_tab.__name__ == "<lambda>":
            module.create_train_tab = upstream
    else:
        extend(seam, module)
hooks._extend = edited
from llamafactory.webui import interface
interface.create_ui()
hooks.require_all()
print([name for name, reason in hooks.attach_all(hooks.BOARD_SEAMS).items() if reason])
"""
        return python(program)

    with started_ahead(request, "test_a_train_tab_that_does_not_fit_is_upstreams", run) as started:
        yield started


@pytest.mark.parametrize(
    "edit",
    [
        "module.create_train_tab = lambda: None",  # noticed when the module is extended
        "from lmtp_factory.plugin.webui import panel; panel.LMTPConfig = None",  # when the panel is built
        "from lmtp_factory.plugin.seams.webui.components import train; train.place_before = None",  # when it finds its place
    ],
)
def test_a_train_tab_that_does_not_fit_is_upstreams(edit, board_that_does_not_fit):
    result = board_that_does_not_fit[edit,].result()
    assert "LLaMA Board goes on without it" in result.stderr
    assert result.stdout.splitlines()[-1] == "['llamafactory.webui.components.train']"
