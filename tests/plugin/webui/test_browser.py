"""The whole job by clicking: stage 1, stage 2, export, chat."""

import importlib.util
import json
import os
from pathlib import Path

import page as pages
import pytest

from lmtp_factory.plugin.stages import STAGE_LABELS


MISSING = [
    what
    for what, there in {
        "chromium (apt-get install chromium)": pages.CHROMIUM,
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
        chromium = playwright.chromium.launch(executable_path=pages.CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    named = os.environ.get("LMTP_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("webui")


@pytest.fixture(scope="module")
def address(folder):
    with pages.served(folder) as address:
        yield address


@pytest.fixture
def open_page(browser, address, screenshots):
    opened = []

    def open_page(language="en", theme="light"):
        opened.append(pages.Page(browser, address, language, theme, screenshots))
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
    page.enter("output_dir", output)


def run(page, seconds=TRAINS_WITHIN):
    page.press("start_btn")
    page.says(page.alert("info_finished"), seconds)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_whole_job(open_page, folder, llama, data, language):
    page = open_page(language)
    set_up(page, llama, data, STAGE1, f"warm_{language}")
    assert (page.value("finetuning_type"), page.value("learning_rate")) == ("full", "1e-3")
    page.fill("num_heads", 2)
    page.press("cmd_preview_btn")
    page.says("--num_heads 2")
    page.shoot("preview")
    run(page)
    page.shoot("stage1")
    warm = folder / "saves" / "Custom" / "full" / f"warm_{language}"
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
    run(page)
    page.shoot("stage2")
    assert (folder / "saves" / "Custom" / "lora" / f"tuned_{language}" / "lmtp" / "model.safetensors").is_file()

    page.choose("checkpoint_path", f"tuned_{language}")
    page.open_tab("Export")
    page.tab.get_by_role("radio", name="heads", exact=True).check()
    page.fill("export_dir", str(folder / f"export_{language}"))
    page.press("export_btn")
    page.settle()
    page.shoot("export")
    pages.soon(lambda: (folder / f"export_{language}" / "lmtp" / "config.json").is_file(), "an export", 60)

    page.open_tab("Chat")
    page.press("load_btn")
    pages.soon(lambda: page.tab.get_by_placeholder(page.text("query", "placeholder")).is_visible(), "a chat", 60)
    page.fill("max_new_tokens", 40)
    for strategy in ("backward", "off"):
        page.choose("lmtp_decode", strategy)
        page.write("query", "what does a frog do?")
        page.press("submit_btn")
        page.says(f"{strategy})" if language == "en" else f"{strategy}）", 60)
    page.shoot("chat")
