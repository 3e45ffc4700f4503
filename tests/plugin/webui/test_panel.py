"""The L-MTP panel: what it shows, says and fills in."""

import pytest
from helpers.llamafactory_runs import write_finished_stage1

from lmtp_factory.plugin.stages import STAGE_LABELS
from lmtp_factory.plugin.webui import fields, panel, runs, texts
from lmtp_factory.plugin.webui.suggestions import Suggestions


STAGE1, STAGE2 = STAGE_LABELS
SFT = "Supervised Fine-Tuning"
LANGUAGES = ("en", "ru", "zh", "ko", "ja")


def test_every_component_of_ours_speaks_every_language(board):
    from llamafactory.webui.locales import LOCALES

    ours = texts.of("en").LABELS
    registered = {id for id, _ in board.engine.manager.get_elem_iter()}
    assert set(ours) <= registered
    for name, properties in ours.items():
        assert set(LOCALES[name]) == set(LANGUAGES)
        for language in LANGUAGES:
            assert set(LOCALES[name][language]) == set(properties), (name, language)
            assert all(LOCALES[name][language].values())
            if language != "en":
                assert LOCALES[name][language] != properties, f"{name} is not translated to {language}"
    for language in LANGUAGES:
        assert set(texts.of(language).ALERTS) == set(texts.of("en").ALERTS)
        assert set(texts.of(language).LABELS) == set(ours)


def test_the_panel_is_all_labelled_when_the_language_changes(board):
    for language in LANGUAGES:
        updated = board.engine.change_lang(language)
        for key in (*fields.ALL_FIELDS, "lmtp_panel", "lmtp_about", "lmtp_reach"):
            assert board.component(f"train.{key}") in updated


def test_the_panel_lies_among_upstreams(board):
    accordion, extra = board.component("train.lmtp_panel"), board.component("train.extra_tab")
    siblings = accordion.parent.children
    assert siblings.index(extra) == siblings.index(accordion) + 1
    assert not accordion.visible


def test_our_fields_are_inputs_of_every_button_of_the_train_tab(board):
    ours = {board.component(f"train.{key}") for key in fields.ALL_FIELDS}
    for name in ("preview_train", "run_train", "save_args"):
        handler = next(fn for fn in board.blocks.fns.values() if fn.name == name)
        assert ours <= set(handler.inputs), name
    for name in ("load_args", "check_output_dir"):
        handler = next(fn for fn in board.blocks.fns.values() if fn.name == name)
        assert ours <= set(handler.outputs), name
    evaluation = next(fn for fn in board.blocks.fns.values() if fn.name == "preview_eval")
    assert not ours & set(evaluation.inputs)


@pytest.mark.parametrize(
    ("label", "visible"), [(STAGE1, [True, True, False]), (STAGE2, [True, False, True]), (SFT, [False] * 3)]
)
def test_what_a_stage_shows(label, visible):
    assert [update.visible for update in panel.Panel.show(label)] == visible


def followed(board, label, typed=(), **now):
    suggestions = Suggestions(board.engine.manager)
    values = {
        "top.finetuning_type": "lora",
        "train.learning_rate": "5e-5",
        "train.num_train_epochs": "3.0",
        "train.output_dir": "train_noon",
        "train.stage1_pretrained_path": "",
    } | {id.replace("__", "."): value for id, value in now.items()}
    updates = suggestions.follow(
        label, list(typed), "noon", "Custom", "some/model", *(values[id] for id in suggestions.ids)
    )
    return {id: update["value"] for id, update in zip(suggestions.ids, updates) if "value" in update}


def test_values_follow_the_stage(board, folder):
    stage1 = {"top.finetuning_type": "full", "train.learning_rate": "1e-3", "train.num_train_epochs": "1.0"}
    assert followed(board, STAGE1) == stage1 | {"train.output_dir": "lmtp1_noon"}
    assert followed(board, STAGE2) == {"train.learning_rate": "1e-5", "train.output_dir": "lmtp2_noon"}
    after_stage1 = {id.replace(".", "__"): value for id, value in stage1.items()} | {"train__output_dir": "lmtp1_noon"}
    assert followed(board, STAGE2, **after_stage1) == {
        "top.finetuning_type": "lora", "train.learning_rate": "1e-5", "train.num_train_epochs": "3.0",
        "train.output_dir": "lmtp2_noon",
    }  # fmt: skip
    assert followed(board, SFT, **after_stage1) == {
        "top.finetuning_type": "lora", "train.learning_rate": "5e-5", "train.num_train_epochs": "3.0",
        "train.output_dir": "train_noon",
    }  # fmt: skip


def test_what_was_typed_stays(board, folder):
    assert "train.learning_rate" not in followed(board, STAGE1, train__learning_rate="2e-4")
    assert "train.learning_rate" not in followed(board, STAGE1, typed=["train.learning_rate"])
    assert "train.output_dir" not in followed(board, STAGE1, train__output_dir="my_run")


def test_stage_2_proposes_the_newest_warm_up(board, folder):
    run = write_finished_stage1(folder)
    assert followed(board, STAGE2)["train.stage1_pretrained_path"] == str(run.relative_to(folder))
    assert "train.stage1_pretrained_path" not in followed(board, STAGE1)


def test_finished_warm_ups_of_the_chosen_model(folder):
    run, other = write_finished_stage1(folder), write_finished_stage1(folder, base="another", name="other")
    tuned = write_finished_stage1(folder, name="stage2")
    (tuned / "config.json").touch()
    unfinished = folder / "saves" / "Custom" / "full" / "aborted" / "checkpoint-10" / "lmtp"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").touch()
    assert runs.finished_stage1_runs("Custom", "some/model") == [str(run.relative_to(folder))]
    assert runs.finished_stage1_runs("Custom", "another") == [str(other.relative_to(folder))]
    assert runs.finished_stage1_runs("Qwen2.5-3B", "some/model") == []
    assert runs.finished_stage1_runs(None, None) == []
    named = write_finished_stage1(folder, base="Qwen/Qwen2.5-3B", model="Qwen2.5-3B")
    assert runs.finished_stage1_runs("Qwen2.5-3B", "a/local/copy") == [str(named.relative_to(folder))]


def test_the_panel_tells_how_far_the_heads_look(folder):
    def told(*values):
        reach, problem = panel.check_geometry(*values)
        assert problem["visible"] == (not reach) or values[-1] == "somebody/heads"
        return reach or problem.get("value", "")

    assert told(STAGE1, None, None, "", "") == "+1, +3, +5, +7"
    assert told(STAGE1, 2, 1, "", None) == "+1, +2, +3"
    assert told(STAGE1, None, None, "2,3,6", "") == "+1, +2, +3, +6"
    assert "leap_offsets" in told(STAGE1, None, None, "two", "")
    run = str(write_finished_stage1(folder))
    assert told(STAGE2, None, None, "", run) == "+1, +4, +7"
    assert "the heads have 2" in told(STAGE2, 3, None, "", run)
    assert told(STAGE2, None, None, "", "somebody/heads") == ""  # of the hub
    (folder / "empty").mkdir()
    assert "empty" in told(STAGE2, None, None, "", "empty")


def test_choosing_an_lmtp_stage_keeps_the_dataset(board):
    from llamafactory.webui.components import train

    assert train.change_stage("Pre-Training") == ([], True)
    assert all("value" not in update for update in train.change_stage(STAGE1))


def test_every_empty_number_has_a_placeholder(board):
    """Without one the page sends 0, which `minimum` refuses: no button of the Train tab would work."""
    import gradio as gr

    numbers = [board.component(f"train.{key}") for key in fields.ALL_FIELDS]
    numbers = [number for number in numbers if isinstance(number, gr.Number) and number.value is None]
    assert len(numbers) > 4 and all(number.placeholder for number in numbers)
