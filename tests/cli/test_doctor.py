"""`lmtp-cli doctor`: what it says about versions. tests/plugin/test_hooks.py runs the whole command."""

from lmtp_factory.cli import doctor
from lmtp_factory.plugin.versions import TRIED_VERSIONS


def problems(**versions: str | None) -> list[str]:
    installed = dict.fromkeys(doctor.PACKAGES, "1.0") | {"llamafactory": TRIED_VERSIONS[-1]}
    return list(doctor._version_problems(installed | versions))


def test_tried_versions_are_no_problem():
    for version in TRIED_VERSIONS:
        assert problems(llamafactory=version) == []


def test_an_untried_version_is_reported():
    assert problems(llamafactory="0.9.6") == [
        'llamafactory 0.9.6 was not tried with L-MTP: pip install "llamafactory==0.9.5".'
    ]


def test_torchaudio_of_another_release_than_torch_is_reported():
    [problem] = problems(torch="2.11.0+cu130", torchaudio="2.11.1")
    assert "do not match" in problem and "torchaudio==2.11.0" in problem
    assert problems(torch="2.11.0+cu130", torchaudio="2.11.0") == []
