"""Texts of the Board, one module a language: component id (or alert) to its label, explanation or text."""

from importlib import import_module
from types import ModuleType


LANGUAGES = ("en", "ru", "zh", "ko", "ja")


def of(language: str) -> ModuleType:
    """The module with `LABELS` and `ALERTS` of a language."""
    return import_module(f".{language}", __package__)


def alert(name: str, language: str) -> str:
    """A sentence that the Board shows when something happens."""
    return of(language).ALERTS[name]
