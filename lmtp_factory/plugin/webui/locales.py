"""Our texts beside upstream's (``llamafactory.webui.locales``); its language switch then reaches them too."""

from importlib import import_module
from types import ModuleType

from .. import hooks


LANGUAGES = ("en", "ru", "zh", "ko", "ja")


def extend_locales(locales: ModuleType) -> None:
    """Add our labels in every language; upstream looks them up by the last part of a component's id.

    Raises:
        KeyError: upstream has got a component of the same name.
    """
    theirs = hooks.expect(locales, "LOCALES")
    ours: dict[str, dict] = {}
    for language in LANGUAGES:
        for name, properties in texts(language).LABELS.items():
            ours.setdefault(name, {})[language] = properties
    taken = set(ours) & set(theirs)
    if taken:
        raise KeyError(f"LOCALES has {', '.join(sorted(taken))} already")
    theirs.update(ours)


def alert(name: str, language: str) -> str:
    """A sentence that appears when something happens."""
    return texts(language).ALERTS[name]


def texts(language: str) -> ModuleType:
    """The module that holds a language's ``LABELS`` and ``ALERTS``."""
    return import_module(f".texts.{language}", __package__)
