"""The versions of LLaMA-Factory that were tried, and how they train.

Standard library only: `setup.py` runs this file, and `autoload` imports it.
"""

import importlib
import re


PACKAGE = "llamafactory"
# Oldest first. setup.py installs them, hooks.py asks, `lmtp-cli doctor` reports.
TRIED_VERSIONS = ("0.9.5",)

# Every way by which the tried versions parse arguments and train.
_PARSERS = {"_parse_args", "_parse_train_args", "_parse_train_mca_args", "_parse_infer_args", "_parse_eval_args"}
_RUNS = {"run_pt", "run_sft", "run_rm", "run_ppo", "run_dpo", "run_kto"}
_RUNS_OF_BACKENDS = {"run_sft_hp", "run_pt_mca", "run_sft_mca", "run_dpo_mca"}


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
    parsers = {name for name in vars(parser) if re.fullmatch(r"_parse_\w*args", name)}
    # Backends are imported inside the function, so that their names are among its local variables.
    runs = {name for name in (*train.co_names, *train.co_varnames) if name.startswith("run_")}
    return sorted(parsers - _PARSERS) + sorted(runs - _RUNS - _RUNS_OF_BACKENDS)
