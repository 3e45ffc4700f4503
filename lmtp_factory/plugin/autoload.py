"""Entry point in group ``torch.backends``: torch calls it at the end of every ``import torch`` in this environment.

That is how an unmodified ``llamafactory-cli``, torchrun's and Ray's workers and the web UI's subprocess all come to
know L-MTP. It runs in every other torch program too, so it imports the standard library only, takes about a
millisecond, and never raises: torch would turn that into a broken ``import torch``.
"""

import os
import sys


DISABLE_VARIABLE = "LMTP_FACTORY_DISABLE"


def is_disabled() -> bool:
    """Whether the user switched the plugin off with ``LMTP_FACTORY_DISABLE=1``."""
    return os.environ.get(DISABLE_VARIABLE, "0").lower() not in ("", "0", "false", "no")


def autoload() -> None:
    """Arrange for LLaMA-Factory's modules to be extended as they are imported."""
    if is_disabled():
        return
    try:
        from . import hooks

        hooks.install()
    except Exception as error:  # whatever it is, import torch has to go on; L-MTP stages then fail as unknown
        print(f"lmtp_factory could not attach to LLaMA-Factory: {error!r}", file=sys.stderr)
