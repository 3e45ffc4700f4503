"""Data files of the package: `configs` and `datasets`, in an installation or a source checkout."""

import importlib.util
from pathlib import Path

from .errors import LMTPError


_CHECKOUT_FOLDERS = {"configs": "configs", "datasets": "data"}


def folder(name: str) -> Path:
    """Return the directory of the resource package `lmtp_factory.<name>`.

    Raises:
        LMTPError: The directory does not exist because the installation is broken.
    """
    installed = importlib.util.find_spec(f"lmtp_factory.{name}")
    places = [Path(place) for place in installed.submodule_search_locations or ()] if installed else []
    # An editable install does not copy the directories, so look in the checkout.
    places.append(Path(__file__).resolve().parents[1] / _CHECKOUT_FOLDERS[name])
    for place in places:
        if place.is_dir():
            return place
    raise LMTPError(f"The {name} that come with lmtp_factory are missing: install the package again.")
