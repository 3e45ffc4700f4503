"""`lmtp-cli import`: convert heads that other programs trained into an `lmtp/` folder."""

import argparse
from pathlib import Path

from ..convert.offsets import asked_heads, check_asked, parse_offsets
from ..errors import LMTPError, first_line
from ..files import HEADS_FOLDER
from .heads_output import check_output


FORMAT_NAMES = ("auto", "release", "medusa")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory or hub id with safetensors")
    parser.add_argument("--base", metavar="MODEL", help="base model of the heads (default: as the checkpoint says)")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help=f"directory for {HEADS_FOLDER}/; may be the base model"
    )
    parser.add_argument("--format", choices=FORMAT_NAMES, default="auto", help="default: by tensor names")
    leaps = parser.add_mutually_exclusive_group()
    leaps.add_argument("--stride", type=int, metavar="K", help="constant stride; selects from Medusa's heads")
    leaps.add_argument(
        "--offsets", type=parse_offsets, metavar="N,N,...", help="offset of each head; selects from Medusa's heads"
    )
    leaps.add_argument("--text", metavar="FILE", help="measure the offsets on text or on rows of lmtp-cli distill")


def run(args: argparse.Namespace) -> int:
    """Convert the heads: find, check, read, measure their offsets if requested, and save."""
    check_asked(args.stride, args.offsets)
    if args.text and not Path(args.text).is_file():
        raise LMTPError(f"--text {args.text} is no file: name a text file or the JSONL that lmtp-cli distill wrote.")

    from ..convert.heads import check_shapes, find_heads, load_base_config, read_heads
    from ..convert.source import open_checkpoint
    from ..modeling.checkpoint import save_heads

    checkpoint = open_checkpoint(args.checkpoint)
    found = find_heads(checkpoint, None if args.format == "auto" else args.format)
    if args.text:
        chosen = {head + 2: head for head in range(found.num_heads)}  # all heads; their offsets are measured below
    else:
        chosen = asked_heads(checkpoint.name, found.num_heads, found.format.ADJACENT, args.stride, args.offsets)
    base = args.base or found.format.base_model(checkpoint.config)
    if not base:
        raise LMTPError(f"{checkpoint.name} does not name its base model: write --base with its directory or hub id.")
    check_output(Path(args.output), base)

    config = check_shapes(found, load_base_config(base))
    print(f"{found.format.TITLE}: {found.num_heads} heads of {found.layers} residual block(s) for {base}")
    config.offsets = (1, *chosen)
    heads = read_heads(found, config, list(chosen.values()))
    if args.text:
        heads.config.offsets = (1, *_measured(base, heads, args.text))
    folder = Path(args.output, HEADS_FOLDER)
    save_heads(heads, folder)
    print(f"Written: {folder}, offsets {','.join(map(str, heads.config.offsets[1:]))}")
    return 0


def _measured(base: str, heads, text: str) -> tuple[int, ...]:
    """Measure the offsets of the heads on a text file and print the table."""
    from ..convert.measure import decide, measure, read_text, table
    from ..evaluation.report import load_for_scoring

    rows = read_text(text, base, heads.config.vocab_size)
    try:
        model = load_for_scoring(base, heads.config.offsets)
    except LMTPError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise LMTPError(
            f"The base model {base} cannot be loaded ({first_line(error.__cause__)}): measuring needs its weights, --stride "
            "and --offsets do not."
        ) from None
    hits, found = measure(model, heads, rows), ()
    try:
        found = decide(hits)
    finally:  # print the table on failure too, because it explains the error
        if hits.shape[-1]:
            print(f"Share of {hits.shape[-1]} positions of {text} where a head predicts the token at an offset")
            print("correctly and the LM head's prediction is another token:")
            print(table(hits, found))
    return found
