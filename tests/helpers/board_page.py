"""A real ``llamafactory-cli webui`` in a real browser."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

from helpers import llamafactory_runs as runs
from lmtp_factory.plugin.webui import texts


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STARTS_WITHIN = 120
WIDTH, HIGHEST = 1440, 3200  # of a screenshot


@contextlib.contextmanager
def served(folder: Path):
    """The Board's address, while it runs in ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "BROWSER": "true", "NO_PROXY": "127.0.0.1,localhost",
        "PATH": f"{runs.BIN}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    log = folder / "webui.log"
    with log.open("w") as output:
        command = [str(runs.BIN / "llamafactory-cli"), "webui"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + STARTS_WITHIN
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"the Board did not start:\n{log.read_text()[-4000:]}") from None
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(20)


class Page:
    """One page of the Board, whose fields are found by the labels of its language."""

    def __init__(
        self, browser, address: str, language: str = "en", theme: str = "light", screenshots: Path | None = None
    ):
        self.tab = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        self.tab.route(re.compile(r"^(?!http://127\.0\.0\.1).*"), lambda route: route.abort())  # fonts
        self.tab.set_default_timeout(20_000)
        self.errors: list[str] = []
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.screenshots, self.theme = screenshots, theme
        self.tab.goto(f"{address}/?__theme={theme}", wait_until="domcontentloaded")
        self.tab.get_by_role("tab").first.wait_for()
        # The page asks for saved settings when it is loaded, and comes in the language that was chosen last; what is
        # filled in before would be lost.
        self.language = eventually(self._language, "a language")
        eventually(lambda: self.value("output_dir"), "an output name")
        self.choose("lang", language)
        self.language = language
        self.tab.get_by_text(self.text("dataset_dir")).first.wait_for()

    def _language(self) -> str | None:
        """That of the labels that the page shows now."""
        from llamafactory.webui.locales import LOCALES

        for language, text in LOCALES["lang"].items():
            if self.tab.locator(f'input[aria-label="{text["label"]}"]').is_visible():
                return language
        return None

    def text(self, name: str, kind: str = "label") -> str:
        """Upstream's or our own text for a component."""
        from llamafactory.webui.locales import LOCALES

        table = texts.of(self.language).LABELS
        return (table[name] if name in table else LOCALES[name][self.language])[kind]

    def alert(self, name: str) -> str:
        """Upstream's text for an event."""
        from llamafactory.webui.locales import ALERTS

        return ALERTS[name][self.language]

    def field(self, name: str):
        """The element that takes a component's value."""
        label = self.text(name)
        quoted = label.replace('"', '\\"')
        dropdown = self.tab.locator(f'input[aria-label="{quoted}"]')
        slider = self.tab.locator(f'input[aria-label="number input for {quoted}"]')
        exact = re.compile(rf"^\s*{re.escape(label)}\s*$")
        titled = self.tab.locator("label").filter(has=self.tab.get_by_test_id("block-info").filter(has_text=exact))
        typed = titled.locator("input, textarea")
        ticked = self.tab.get_by_role("checkbox", name=label, exact=True)
        return dropdown.or_(slider).or_(typed).or_(ticked).locator("visible=true").first

    def value(self, name: str) -> str:
        return self.field(name).input_value()

    def fill(self, name: str, value) -> None:
        """Type a value and leave the field."""
        field = self.field(name)
        field.fill(str(value))
        field.press("Tab")

    def choose(self, name: str, value: str) -> None:
        """Pick from a dropdown; one that takes several gets one more."""
        field = self.field(name).element_handle()  # by itself: a choice of the language changes its label
        field.click()
        with contextlib.suppress(Exception):  # some only offer, others search too
            field.fill(value, timeout=1000)
        self.tab.get_by_role("option", name=value, exact=True).first.click()
        self.tab.keyboard.press("Escape")
        chosen = (
            "(input, value) => input.value === value || input.parentElement.parentElement.innerText.includes(value)"
        )
        eventually(lambda: field.evaluate(chosen, value), f"{value} as {name}")

    def enter(self, name: str, value: str) -> None:
        """Type into a dropdown what it may not offer."""
        field = self.field(name)
        field.click()
        field.fill(value)
        field.press("Enter")
        field.press("Tab")

    def options(self, name: str) -> list[str]:
        """What a dropdown offers when it is opened."""
        self.field(name).click()
        self.tab.wait_for_timeout(1000)
        offered = [text.strip().removeprefix("✓").strip() for text in self.tab.get_by_role("option").all_inner_texts()]
        self.tab.keyboard.press("Escape")
        return offered

    def write(self, name: str, value: str) -> None:
        """Type into a box that shows a placeholder instead of a label."""
        self.tab.get_by_placeholder(self.text(name, "placeholder")).locator("visible=true").first.fill(value)

    def load_model(self) -> None:
        """In the Chat tab, until one can write to the model."""
        self.open_tab("Chat")
        self.press("load_btn")
        query = self.tab.get_by_placeholder(self.text("query", "placeholder"))
        query.locator("visible=true").first.wait_for(timeout=60_000)

    def settle(self) -> None:
        """Let the handlers of a change that has just been made end."""
        self.tab.wait_for_timeout(1500)

    def open_tab(self, name: str) -> None:
        """Upstream does not translate the tabs' names."""
        self.tab.get_by_role("tab", name=name, exact=True).click()

    def press(self, name: str) -> None:
        button = self.tab.get_by_role("button", name=self.text(name, "value"), exact=True)
        button.locator("visible=true").first.click()

    def says(self, text: str, seconds: float = 20) -> None:
        """Wait until a text is to be read somewhere."""
        self.tab.get_by_text(text).locator("visible=true").first.wait_for(timeout=1000 * seconds)

    def shoot(self, name: str) -> None:
        """Keep a picture of the page, as far down as something but a long log is to be seen."""
        if self.screenshots is not None:
            self.tab.wait_for_timeout(500)
            path = self.screenshots / f"{name}_{self.language}_{self.theme}.png"
            height = min(self.tab.evaluate("document.documentElement.scrollHeight"), HIGHEST)
            clip = {"x": 0, "y": 0, "width": WIDTH, "height": height}
            self.tab.screenshot(path=path, full_page=True, clip=clip)


def eventually(condition, what: str, seconds: float = 20):
    """The condition's value once it holds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"the page never got {what}"
        time.sleep(0.2)
    return value
