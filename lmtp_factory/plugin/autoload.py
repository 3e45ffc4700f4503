"""Entry point in group `torch.backends`: torch calls it at the end of every `import torch` in this environment.

This is how an unmodified `llamafactory-cli`, workers of torchrun and Ray, and the web UI's subprocess learn L-MTP. The
entry point runs in every other torch program too. It therefore imports the standard library only, takes about a
millisecond, and never raises, which would break `import torch`.
"""

import os
import sys


DISABLE_VARIABLE = "LMTP_FACTORY_DISABLE"


def is_disabled() -> bool:
    """Whether `LMTP_FACTORY_DISABLE=1` switches the plugin off."""
    return os.environ.get(DISABLE_VARIABLE, "0").lower() not in ("", "0", "false", "no")


def autoload() -> None:
    """Install the hooks that extend LLaMA-Factory's modules when they are imported."""
    if is_disabled():
        return
    try:
        from . import hooks

        hooks.install()
    except Exception as error:  # import torch must not fail; L-MTP stages are then refused as unknown
        print(f"lmtp_factory could not attach to LLaMA-Factory: {error!r}", file=sys.stderr)
