"""Adds the plugin's labels to upstream's, in every language."""

from types import ModuleType

from ... import hooks
from ...webui import texts


def extend(locales: ModuleType) -> None:
    """Add labels to `LOCALES`, which upstream reads by the last part of a component's id.

    Raises:
        KeyError: Upstream has a component of the same name.
    """
    theirs = hooks.expect(locales, "LOCALES")
    ours: dict[str, dict] = {}
    for language in texts.LANGUAGES:
        for name, properties in texts.of(language).LABELS.items():
            ours.setdefault(name, {})[language] = properties
    taken = set(ours) & set(theirs)
    if taken:
        raise KeyError(f"LOCALES has {', '.join(sorted(taken))} already")
    theirs.update(ours)
