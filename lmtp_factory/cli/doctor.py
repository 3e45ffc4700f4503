"""`lmtp-cli doctor`: check versions, hooks and device, and report how to fix problems."""

import argparse
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

from ..plugin import autoload, hooks
from ..plugin.versions import PACKAGE, TRIED_SOURCES, TRIED_VERSIONS, requirement


PACKAGES = ("lmtp_factory", "llamafactory", "torch", "torchaudio", "torchvision", "transformers", "peft", "deepspeed")
ENTRY_POINT_GROUP = "torch.backends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options: the command checks the environment in which it runs."""


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if there are problems."""
    versions = {name: _version(name) for name in PACKAGES}
    print("Versions")
    print(f"  python        {sys.version.split()[0]}")
    for name, version in versions.items():
        print(f"  {name:<13} {version or 'not installed'}")

    problems = list(_version_problems(versions)) + list(_autoload_problems())
    seams = {} if versions["llamafactory"] is None or autoload.is_disabled() else _seams()
    if seams:
        print("Seams into LLaMA-Factory")
        purposes = {seam.name: seam.purpose for seam in (*hooks.SEAMS, *hooks.BOARD_SEAMS)}
        for name, reason in seams.items():
            print(f"  {'attached' if reason is None else 'MISSING '}  {name:<44} {purposes[name]}")
            if reason is not None:
                problems.append(f'{name} is not attached ({reason}): pip install "{requirement()}".')
    print("Device")
    print(f"  {_device()}")

    if not problems:
        print("Everything is in place.")
        return 0
    print("To fix")
    for problem in problems:
        print(f"  - {problem}")
    return 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _version_problems(versions: dict[str, str | None]) -> Iterator[str]:
    for name, version in versions.items():
        if version is None:
            yield f"{name} is not installed: pip install . in a checkout of lmtp_factory brings a working set."
    if versions[PACKAGE] not in (None, *TRIED_VERSIONS, *TRIED_SOURCES):
        yield f'{PACKAGE} {versions[PACKAGE]} was not tried with L-MTP: pip install "{requirement()}".'
    torch, torchaudio = versions["torch"], versions["torchaudio"]
    if torch and torchaudio and _release(torch) != _release(torchaudio):
        yield (
            f"torch {torch} and torchaudio {torchaudio} do not match, so LLaMA-Factory cannot import: "
            'pip install "torch==2.11.0" "torchaudio==2.11.0" "torchvision==0.26.0".'
        )
    if versions["transformers"] == "5.6.0":
        yield 'transformers 5.6.0 has a broken flash-attention path: pip install "transformers!=5.6.0,<=5.6".'


def _release(version: str) -> str:
    return version.split("+")[0]


def _autoload_problems() -> Iterator[str]:
    if autoload.is_disabled():
        yield f"{autoload.DISABLE_VARIABLE} is set, so L-MTP is off: unset it."
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        yield "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading L-MTP: unset it."
    if not any(entry.value.startswith(autoload.__name__) for entry in metadata.entry_points(group=ENTRY_POINT_GROUP)):
        yield "torch cannot find the plugin, because lmtp_factory is not installed: pip install . in its checkout."


def _seams() -> dict[str, str | None]:
    if find_spec("torch") is not None:
        import torch  # noqa: F401  attaches the hooks, as in every program
    return hooks.attach_all((*hooks.SEAMS, *hooks.BOARD_SEAMS))


def _device() -> str:
    try:
        import torch
    except Exception as error:
        return f"unknown: torch does not import ({error})"
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads"
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{names}; bf16 {'supported' if torch.cuda.is_bf16_supported() else 'not supported'}"
