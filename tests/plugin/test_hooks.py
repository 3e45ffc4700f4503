"""The contract with LLaMA-Factory: every seam attaches, in every kind of process, and nothing else is touched."""

import json
from importlib import import_module, metadata

import pytest
from helpers import llamafactory_runs as runs
from helpers.processes import python, started_ahead

from lmtp_factory import LMTPError
from lmtp_factory.plugin import hooks
from lmtp_factory.plugin.versions import TRIED_SOURCES, TRIED_VERSIONS


pytestmark = pytest.mark.xdist_group("hooks")  # its programs are started ahead, once


def test_every_seam_attaches():
    import torch  # noqa: F401

    assert hooks.attach_all() == {seam.name: None for seam in hooks.SEAMS}
    hooks.require_all()


def test_the_seams_reach_their_users():
    """What upstream's own modules see under the names that they imported."""
    hooks.attach_all()
    tuner = import_module("llamafactory.train.tuner")
    parser = import_module("llamafactory.hparams.parser")
    assert tuner.run_sft.__module__ == "llamafactory.train.sft.workflow"  # functools.wraps keeps the name ...
    assert tuner.run_sft.__code__.co_filename.endswith("plugin/seams/train/sft/workflow.py")  # ... of our function
    assert tuner.load_model.__code__.co_filename.endswith("plugin/seams/model/loader.py")
    assert tuner.get_train_args is parser.get_train_args
    assert parser._parse_train_args.__code__.co_filename.endswith("plugin/seams/hparams/parser.py")
    assert {"head_weight", "leap_offsets"} <= set(parser.FinetuningArguments.__dataclass_fields__)
    arguments = next(c for c in parser._TRAIN_ARGS if c.__name__ == "FinetuningArguments")
    assert arguments is parser.FinetuningArguments
    assert tuner.LogCallback.on_log.__code__.co_filename.endswith("plugin/seams/train/callbacks.py")
    constants = import_module("llamafactory.extras.constants")
    assert list(constants.TRAINING_STAGES)[0] == "Supervised Fine-Tuning"  # the web UI's default stays first
    assert list(constants.TRAINING_STAGES.values())[-2:] == ["lmtp1", "lmtp2"]
    assert "lmtp/model.safetensors" in constants.CHECKPOINT_NAMES
    assert "lmtp" in import_module("llamafactory.data.template").TEMPLATES
    engine = import_module("llamafactory.chat.hf_engine")
    assert engine.load_model.__code__.co_filename.endswith("plugin/inference.py")
    for answers in (engine.HuggingfaceEngine.chat, engine.HuggingfaceEngine.stream_chat):
        assert answers.__code__.co_filename.endswith("plugin/seams/chat/hf_engine.py")
    run_chat = import_module("llamafactory.chat.chat_model").run_chat
    assert run_chat.__code__.co_filename.endswith("plugin/seams/chat/chat_model.py")


def test_the_boards_seams_stand_apart():
    """Each attaches, and a training process imports neither them nor gradio."""
    program = (
        "import json, sys\nfrom llamafactory.train.tuner import run_exp\nfrom lmtp_factory.plugin import hooks\n"
        "hooks.require_all()\nbefore = [n for n in sys.modules if n == 'gradio' or n.startswith('llamafactory.webui')]\n"
        "print(json.dumps([before, hooks.attach_all(hooks.BOARD_SEAMS)]))"
    )
    before, states = json.loads(python(program).stdout.splitlines()[-1])
    assert before == []
    assert states == {seam.name: None for seam in hooks.BOARD_SEAMS}


@pytest.fixture(scope="module")
def after_first_import(request):
    """The state of every seam in processes that begin with one import."""
    program = (
        "import importlib, json, sys\nimportlib.import_module(sys.argv[1])\n"
        "from lmtp_factory.plugin import hooks\nstates = hooks.attach_all()\n"
        "import llamafactory.hparams as a, llamafactory.hparams.parser as b, llamafactory.model as c\n"
        "import llamafactory.model.loader as d, llamafactory.train.tuner as e\n"
        "assert a.FinetuningArguments is b.FinetuningArguments and a.FinetuningArguments in b._TRAIN_ARGS\n"
        "assert c.load_model is d.load_model is e.load_model\n"
        "assert a.FinetuningArguments(stage='lmtp2').lmtp_stage == 2\n"
        "print(json.dumps(states))"
    )
    with started_ahead(
        request, "test_seams_attach_whatever_a_process_imports_first", lambda name: python(program, name)
    ) as started:
        yield started


@pytest.mark.parametrize(
    "first_import",
    ["llamafactory.cli", "llamafactory.launcher", "llamafactory.train.tuner", "llamafactory.extras.constants",
     "llamafactory.hparams", "llamafactory.model", "llamafactory.data", "llamafactory.webui.interface", "transformers"],
)  # fmt: skip
def test_seams_attach_whatever_a_process_imports_first(first_import, after_first_import):
    """torchrun's worker (tuner before torch) and the web UI included."""
    states = json.loads(after_first_import[first_import,].result().stdout.splitlines()[-1])
    assert set(states.values()) == {None}, states


def test_autoload_is_cheap_and_imports_the_standard_library_only():
    program = (
        "import os, sys, time\nstarted = time.perf_counter()\nimport torch\nprint(time.perf_counter() - started)\n"
        "os.environ['LMTP_FACTORY_DISABLE'] = '0'\nbefore = set(sys.modules)\nstarted = time.perf_counter()\n"
        "from lmtp_factory.plugin.autoload import autoload\nautoload()\nprint(time.perf_counter() - started)\n"
        "assert 'lmtp_factory.plugin.hooks' in sys.modules\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names - {'lmtp_factory'}))"
    )
    measured = [python(program, LMTP_FACTORY_DISABLE="1").stdout.splitlines() for _ in range(3)]
    assert {foreign for _, _, foreign in measured} == {"[]"}
    assert min(float(ours) / float(torch) for torch, ours, _ in measured) < 0.02


def test_a_failure_of_ours_leaves_torch_alone():
    program = (
        "import lmtp_factory.plugin.hooks as hooks\n"
        "def broken(): raise RuntimeError('a bug of ours')\nhooks.install = broken\n"
        "import torch\nprint(torch.ones(1).item())"
    )
    result = python(program)
    assert result.stdout.strip() == "1.0"
    assert "a bug of ours" in result.stderr


def test_the_plugin_switched_off_never_trains_plain_sft(llama, data, tmp_path):
    program = "import torch, sys; print('lmtp_factory.plugin.hooks' in sys.modules)"
    assert python(program, LMTP_FACTORY_DISABLE="1").stdout.strip() == "False"
    args = runs.arguments(llama, data, tmp_path / "out")
    path = runs.write_yaml(tmp_path / "x.yaml", args)
    result = runs.cli("train", path, check=False, LMTP_FACTORY_DISABLE="1")
    assert result.returncode != 0, "an L-MTP stage must never train plain SFT"
    assert not (tmp_path / "out" / "trainer_state.json").exists()


@pytest.fixture(scope="module")
def with_unknown_layout(request, llama, data, tmp_path_factory):
    """Processes that parse plain SFT and then an L-MTP stage while one upstream module looks otherwise."""
    program = (
        "import sys, json\nimport lmtp_factory.plugin.hooks as hooks\nextend = hooks._extend\n"
        "def edited(seam, module):\n    if seam.name == sys.argv[1]:\n        exec(sys.argv[2])\n    extend(seam, module)\n"
        "hooks._extend = edited\n"
        "from llamafactory.hparams import get_train_args\n"
        "args = json.load(open(sys.argv[3]))\n"
        "print(get_train_args({**args, 'stage': 'sft'})[3].stage)\n"
        "get_train_args(args)\n"
    )
    folder = tmp_path_factory.mktemp("layout")
    path = runs.write_yaml(folder / "x.json", runs.arguments(llama, data, folder / "out"))
    with started_ahead(
        request, "test_an_unknown_layout_is_named", lambda seam, edit: python(program, seam, edit, path, check=False)
    ) as started:
        yield started


@pytest.mark.parametrize(
    ("seam", "edit"),
    [
        ("llamafactory.train.sft.workflow", "module.run_sft = lambda model_args: None"),
        ("llamafactory.model.loader", "del module.init_adapter"),
        ("llamafactory.train.callbacks", "del module.LogCallback._write_log"),
    ],
)
def test_an_unknown_layout_is_named(seam, edit, with_unknown_layout):
    """An upstream module that looks otherwise: plain SFT still trains, an L-MTP stage names the seam."""
    result = with_unknown_layout[seam, edit].result()
    assert result.stdout.splitlines()[-1] == "sft"
    last = result.stderr.splitlines()[-1]
    assert seam in last and metadata.version("llamafactory") in last and "lmtp-cli doctor" in last


@pytest.fixture
def untried(monkeypatch):
    """LLaMA-Factory says that it is a version that nobody tried."""
    monkeypatch.setattr(hooks, "version", lambda: "0.9.6")
    monkeypatch.setattr(hooks, "_warned", set())


def test_an_untried_version_that_fits_goes_on_with_a_warning(untried, lines):
    hooks.require_all()
    hooks.require_all()
    assert [line for line in lines if "0.9.6" in line] == [
        "LLaMA-Factory 0.9.6 was not tried with L-MTP (0.9.5 was). All hooks fit, so the run goes on; check its first "
        "results."
    ]


@pytest.mark.parametrize("entry", ["_parse_other_args", "run_sft_mbridge"])
def test_an_untried_version_with_another_way_to_train_is_refused(entry, untried, monkeypatch):
    """An L-MTP stage is `sft` to upstream: a trainer or parser that the plugin does not know would train plain SFT."""
    from llamafactory.hparams import FinetuningArguments

    if entry.startswith("_parse"):
        monkeypatch.setattr(import_module("llamafactory.hparams.parser"), entry, lambda args=None: args, raising=False)
    else:
        names = {}
        exec(
            f"def _training_function(config):\n    from .mbridge import run_sft as {entry}\n    {entry}(config)", names
        )
        monkeypatch.setattr(
            import_module("llamafactory.train.tuner"), "_training_function", names["_training_function"]
        )
    with pytest.raises(LMTPError) as caught:
        FinetuningArguments(stage="lmtp1")
    assert str(caught.value) == (
        f"L-MTP cannot run with LLaMA-Factory 0.9.6, which was not tried and trains by ways that lmtp_factory does not know "
        f"({entry}): install llamafactory==0.9.5 or a newer lmtp_factory."
    )
    assert FinetuningArguments(stage="sft").lmtp_stage is None


def test_the_version_that_is_installed_was_tried(lines, monkeypatch):
    monkeypatch.setattr(hooks, "_warned", set())
    hooks.require_all()
    installed = metadata.version("llamafactory")
    assert installed in (*TRIED_VERSIONS, *TRIED_SOURCES)
    assert bool(lines) == (installed in TRIED_SOURCES)


def test_a_development_version_that_was_tried_says_when(lines, monkeypatch):
    monkeypatch.setattr(hooks, "version", lambda: "0.9.6.dev0")
    monkeypatch.setattr(hooks, "_warned", set())
    hooks.require_all()
    assert lines == [
        "LLaMA-Factory 0.9.6.dev0 is in development and was tried with L-MTP as of 18 August 2026. All hooks fit, so the "
        "run goes on; check its first results."
    ]


@pytest.mark.parametrize("keys", [{"lmtp_decode": "backward"}, {"lmtp_decode": "forward"}, {"lmtp_export": "heads"}])
def test_what_needs_heads_needs_every_seam(keys, monkeypatch):
    """Without the parser's seam nothing else would look at these keys."""
    from llamafactory.hparams import FinetuningArguments

    monkeypatch.setitem(hooks._failures, "llamafactory.hparams.parser", "it looks otherwise")
    monkeypatch.setattr(hooks, "_attached", hooks._attached - {"llamafactory.hparams.parser"})
    with pytest.raises(LMTPError, match=r"could not extend llamafactory.hparams.parser \(it looks otherwise\)"):
        FinetuningArguments(**keys)
    FinetuningArguments(lmtp_decode="off", lmtp_export="ntp")


def test_a_reloaded_module_is_extended_again():
    program = (
        "import importlib, llamafactory.train.callbacks as callbacks\n"
        "callbacks = importlib.reload(callbacks)\n"
        "print(callbacks.LogCallback.on_log.__code__.co_filename)"
    )
    assert python(program).stdout.strip().endswith("plugin/seams/train/callbacks.py")


def test_doctor_lists_every_seam():
    result = runs.cli(str(runs.BIN / "lmtp-cli"), "doctor")
    attached = [line for line in result.stdout.splitlines() if line.startswith("  attached")]
    assert len(attached) == len(hooks.SEAMS) + len(hooks.BOARD_SEAMS)
    assert "Everything is in place." in result.stdout
    off = runs.cli(str(runs.BIN / "lmtp-cli"), "doctor", check=False, LMTP_FACTORY_DISABLE="1")
    assert off.returncode == 1
    assert "LMTP_FACTORY_DISABLE is set, so L-MTP is off: unset it." in off.stdout
