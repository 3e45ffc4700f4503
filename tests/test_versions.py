"""The versions that setup.py installs are those that the code accepts."""

import re
from pathlib import Path

from lmtp_factory.decoding import compat
from lmtp_factory.plugin import hooks


def requirement(package: str) -> str:
    text = Path(__file__).parents[1].joinpath("setup.py").read_text(encoding="utf-8")
    return re.search(rf'"{package}([<>=!][^"]+)"', text)[1]


def test_llamafactory():
    assert requirement("llamafactory") == f"=={hooks.SUPPORTED_VERSION}"


def test_transformers():
    bounds = requirement("transformers").split(",")
    assert (bounds[0], bounds[-1]) == (f">={compat.OLDEST}", f"<{compat.TOO_NEW}")
