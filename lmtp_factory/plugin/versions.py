"""The versions of LLaMA-Factory that were tried, and how they train.

Standard library only: `setup.py` runs this file, and `autoload` imports it.
"""

import importlib
import re
from importlib import metadata


PACKAGE = "llamafactory"
# Oldest first. setup.py installs them, hooks.py asks, `lmtp-cli doctor` reports.
TRIED_VERSIONS = ("0.9.5",)
# Development versions that were tried too, which no index has. The name covers many commits, so they run with a warning.
TRIED_SOURCES = {"0.9.6.dev0": "18 August 2026"}

# Every way by which the tried versions parse arguments and train. Parsers of backends refuse L-MTP stages, known or not.
_PARSERS = {"_parse_args", "_parse_train_args", "_parse_infer_args", "_parse_eval_args"}
PARSER_OF_BACKEND = re.compile(r"_parse_train_\w+_args")
_RUNS = {"run_pt", "run_sft", "run_rm", "run_ppo", "run_dpo", "run_kto"}
_RUNS_OF_BACKENDS = {"run_sft_hp", "run_pt_hp", "run_pt_mca", "run_sft_mca", "run_dpo_mca", "run_pt_mb", "run_sft_mb"}


def requirement() -> str:
    """The tried versions in the format of pip."""
    oldest, newest = TRIED_VERSIONS[0], TRIED_VERSIONS[-1]
    return f"{PACKAGE}=={newest}" if oldest == newest else f"{PACKAGE}>={oldest},<={newest}"


def unknown_entries() -> list[str]:
    """Parsers and training functions of the installed version that the tried versions lack.

    An L-MTP stage is `sft` to LLaMA-Factory, so a parser or trainer that the plugin does not extend or refuse would train
    plain SFT.
    """
    parser = importlib.import_module(f"{PACKAGE}.hparams.parser")
    train = importlib.import_module(f"{PACKAGE}.train.tuner")._training_function.__code__
    parsers = {
        name for name in vars(parser) if re.fullmatch(r"_parse_\w*args", name) and not PARSER_OF_BACKEND.fullmatch(name)
    }
    # Backends are imported inside the function, so that their names are among its local variables.
    runs = {name for name in (*train.co_names, *train.co_varnames) if name.startswith("run_")}
    return sorted(parsers - _PARSERS) + sorted(runs - _RUNS - _RUNS_OF_BACKENDS)


def pads_packed_positions() -> bool:
    """Return whether the installed version pads the positions of packed rows as it pads their tokens (since 0.9.6)."""
    from packaging.version import Version

    return Version(metadata.version(PACKAGE)) >= Version("0.9.6.dev0")
