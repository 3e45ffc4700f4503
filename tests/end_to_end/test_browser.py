"""The whole job by clicking: stage 1, stage 2, export, chat."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from helpers import board_page, chat_models

from lmtp_factory.plugin.stages import STAGE_LABELS


MISSING = [
    what
    for what, there in {
        "chromium (apt-get install chromium)": board_page.CHROMIUM,
        "playwright (pip install playwright)": importlib.util.find_spec("playwright"),
    }.items()
    if not there
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

STAGE1, STAGE2 = STAGE_LABELS
TRAINS_WITHIN = 180


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=board_page.CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    named = os.environ.get("LMTP_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A heads export that speaks English."""
    return chat_models.save_english_speaking(tmp_path_factory.mktemp("models") / "speaking")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("webui")


@pytest.fixture(scope="module")
def address(folder):
    with board_page.served(folder) as address:
        yield address


@pytest.fixture
def open_page(browser, address, screenshots):
    opened = []

    def open_page(language="en", theme="light"):
        opened.append(board_page.Page(browser, address, language, theme, screenshots))
        return opened[-1]

    yield open_page
    for page in opened:
        assert page.errors == []
        page.tab.close()


def set_up(page, model, data, stage, output):
    """Fill in what a run of a minute needs."""
    page.choose("model_name", "Custom")
    page.settle()
    page.fill("model_path", model)
    page.choose("template", "qwen")
    page.choose("training_stage", stage)
    page.settle()
    page.fill("dataset_dir", data)
    page.choose("dataset", "tiny")
    page.choose("compute_type", "fp32")
    page.fill("cutoff_len", 64)
    page.fill("gradient_accumulation_steps", 1)
    page.tab.get_by_role("button", name=page.text("extra_tab")).click()
    page.fill("extra_args", '{"optim": "adamw_torch", "preprocessing_num_workers": 1}')
    page.tab.get_by_role("button", name=page.text("extra_tab")).click()
    page.enter("output_dir", output)


def run(page, output):
    """Start, and wait for the end of the run that writes to ``output``."""
    page.press("start_btn")
    board_page.eventually(lambda: (output / "train_results.json").is_file(), "to the end of training", TRAINS_WITHIN)
    page.says(page.alert("info_finished"), 30)
    page.settle()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_training_export_and_chat_by_clicking(open_page, folder, llama, data, language):
    page = open_page(language)
    set_up(page, llama, data, STAGE1, f"warm_{language}")
    assert (page.value("finetuning_type"), page.value("learning_rate")) == ("full", "1e-3")
    page.fill("num_heads", 2)
    page.press("cmd_preview_btn")
    page.says("--num_heads 2")
    page.shoot("preview")
    warm = folder / "saves" / "Custom" / "full" / f"warm_{language}"
    run(page, warm)
    page.shoot("stage1")
    assert (warm / "lmtp" / "model.safetensors").is_file()
    log = [json.loads(line) for line in (warm / "trainer_log.jsonl").read_text().splitlines()]
    assert "loss_head_2" in log[0]

    page.choose("training_stage", STAGE2)
    page.settle()
    assert (page.value("finetuning_type"), page.value("learning_rate")) == ("lora", "1e-5")
    run_dir = str(warm.relative_to(folder))
    assert page.value("stage1_pretrained_path") == run_dir
    assert run_dir in page.options("stage1_pretrained_path")
    page.enter("output_dir", f"tuned_{language}")
    tuned = folder / "saves" / "Custom" / "lora" / f"tuned_{language}"
    run(page, tuned)
    page.shoot("stage2")
    assert (tuned / "lmtp" / "model.safetensors").is_file()

    page.choose("checkpoint_path", f"tuned_{language}")
    page.open_tab("Export")
    page.tab.get_by_role("radio", name="heads", exact=True).check()
    page.fill("export_dir", str(folder / f"export_{language}"))
    page.press("export_btn")
    page.settle()
    page.shoot("export")
    board_page.eventually(lambda: (folder / f"export_{language}" / "lmtp" / "config.json").is_file(), "an export", 60)

    page.load_model()
    page.fill("max_new_tokens", 40)
    for strategy in ("backward", "off"):
        page.choose("lmtp_decode", strategy)
        page.write("query", "what does a frog do?")
        page.press("submit_btn")
        page.says(f"{strategy})" if language == "en" else f"{strategy}）", 60)
    page.shoot("chat")
    page.press("unload_btn")
    page.settle()


def test_other_stages_do_not_show_the_panel(open_page):
    page = open_page("en", "dark")
    panel = page.tab.get_by_role("button", name=page.text("lmtp_panel"))
    assert not panel.is_visible()
    page.shoot("plain")
    page.choose("training_stage", STAGE1)
    panel.wait_for()
    page.settle()
    page.choose("training_stage", "DPO")
    panel.wait_for(state="hidden")
    page.settle()
    assert page.value("learning_rate") == "5e-5" and page.value("finetuning_type") == "lora"


@pytest.mark.parametrize("language", ["en", "ru", "zh", "ko", "ja"])
def test_the_panel_in_every_language(open_page, language):
    page = open_page(language, "dark" if language in ("en", "ja") else "light")
    for stage, own in ((STAGE1, "hidden_cache_dir"), (STAGE2, "head_weight")):
        page.choose("training_stage", stage)
        page.field(own).wait_for()
        page.shoot(f"panel{STAGE_LABELS[stage][-1]}")


def test_typed_values_stay_and_the_reach_is_told(open_page):
    page = open_page()
    page.fill("learning_rate", "2e-4")
    page.choose("training_stage", STAGE1)
    page.settle()
    assert page.value("learning_rate") == "2e-4" and page.value("finetuning_type") == "full"
    assert page.value("lmtp_reach") == "+1, +3, +5, +7"
    page.fill("num_heads", 2)
    board_page.eventually(lambda: page.value("lmtp_reach") == "+1, +3, +5", "the reach of two heads")
    page.fill("num_heads", "")
    board_page.eventually(lambda: page.value("lmtp_reach") == "+1, +3, +5, +7", "the reach of three heads")
    page.fill("leap_offsets", "6,3")
    page.says("leap_offsets is 6,3")
    assert page.value("lmtp_reach") == ""
    page.fill("leap_offsets", "")
    board_page.eventually(lambda: page.value("lmtp_reach") == "+1, +3, +5, +7", "the reach of three heads")
    assert not page.tab.get_by_text("leap_offsets is").is_visible()


def test_arguments_are_saved_and_loaded(open_page, folder, llama, data):
    page = open_page()
    set_up(page, llama, data, STAGE2, "saved")
    page.fill("leap_offsets", "2,3")
    page.fill("head_weight", 0.2)
    page.enter("config_path", "lmtp.yaml")
    page.press("arg_save_btn")
    page.says("lmtp.yaml")
    board_page.eventually(lambda: (folder / "llamaboard_config" / "lmtp.yaml").is_file(), "saved arguments")

    page = open_page()
    page.enter("config_path", "lmtp.yaml")
    page.press("arg_load_btn")
    page.field("head_weight").wait_for()
    page.settle()
    assert (page.value("leap_offsets"), page.value("head_weight")) == ("2,3", "0.2")
    assert page.value("learning_rate") == "1e-5"
    page.tab.get_by_label("tiny").or_(page.tab.get_by_text("tiny", exact=True)).first.wait_for()


def test_a_refusal_is_readable(open_page, llama, data):
    page = open_page()
    set_up(page, llama, data, STAGE1, "refused")
    page.choose("finetuning_type", "lora")
    page.settle()
    page.press("start_btn")
    page.says("L-MTP cannot run like this:", TRAINS_WITHIN)
    page.says("Stage 1 trains only the heads")
    page.shoot("refused")
    page.choose("finetuning_type", "full")
    page.fill("leap_offsets", "6,3")
    page.press("cmd_preview_btn")
    page.says("L-MTP cannot run like this: leap_offsets is 6,3")
    page.shoot("refused_at_once")


def test_a_run_is_shown_live_and_stopped(open_page, llama, data):
    page = open_page("en", "dark")
    set_up(page, llama, data, STAGE1, "a_run_with_a_name_that_is_longer_than_most_people_would_write_it")
    page.fill("num_train_epochs", "500")
    page.press("start_btn")
    page.tab.get_by_text("Running ").first.wait_for(timeout=1000 * TRAINS_WITHIN)
    page.tab.locator("img[src*='image'], .plot-container img, [data-testid='matplotlib'] img").first.wait_for()
    page.settle()
    page.shoot("live")
    page.tab.reload()  # somebody comes back to a run
    page.tab.get_by_text("Running ").first.wait_for(timeout=60_000)
    page.field("num_heads").wait_for()
    assert page.value("training_stage") == STAGE1
    page.press("stop_btn")
    page.says(page.alert("info_aborted"), 60)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accepted_drafts_are_shown(open_page, speaking, theme):
    """A heads export, loaded without any checkpoint."""
    page = open_page("en", theme)
    page.choose("model_name", "Custom")
    page.settle()
    page.fill("model_path", speaking)
    page.choose("template", "qwen")
    page.open_tab("Chat")
    page.fill("extra_args", '{"do_sample": false}')
    page.load_model()
    page.write("query", "what does a frog do?")
    page.press("submit_btn")
    page.says("backward)", 60)
    page.tab.locator(".lmtp-answer summary").click()
    page.tab.locator(".lmtp-drafted").first.wait_for()
    page.says("a frog leaps over the old stone")
    page.tab.get_by_text("non-instruct").wait_for(state="hidden")
    page.shoot("drafts")
    page.press("unload_btn")
    page.settle()
