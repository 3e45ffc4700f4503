"""Whether `lmtp-cli import --text` finds the offsets of heads: measured on heads whose offsets are known.

Train one stage 1 with many heads, then treat subsets of them as checkpoints whose offsets are unknown. Each subset is
measured on several numbers of positions. A result is right, refused or wrong; it must never be wrong.

    llamafactory-cli train configs/demo/stage1.yaml leap_offsets=2,3,4,5,7,9,10,13 max_steps=120 output_dir=superset
    python experiments/measured_offsets.py superset --text data/self_distilled_smollm2_heldout.jsonl
"""

import argparse
from collections import Counter
from collections.abc import Sequence

from lmtp_factory import geometry
from lmtp_factory.convert import measure
from lmtp_factory.errors import LMTPError
from lmtp_factory.evaluation.report import load_for_scoring
from lmtp_factory.modeling.model import base_of


POSITIONS = (512, 1024, 2048, 4096)
IRREGULAR = ((2, 4, 7), (3, 4, 9), (2, 3, 5), (2, 5, 9))


def result(hits, offsets: Sequence[int]) -> str:
    """Return `right`, `refused` or the wrong offsets."""
    try:
        found = measure.decide(hits)
    except LMTPError:
        return "refused"
    return "right" if found == tuple(offsets) else f"WRONG {found}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="stage-1 directory with heads of many offsets")
    parser.add_argument("--text", required=True, help="plain text, or rows of lmtp-cli distill")
    args = parser.parse_args()
    model = base_of(load_for_scoring(args.model))
    heads = model.leap_heads
    rows = measure.read_text(args.text, heads.config.base_model, heads.config.vocab_size)
    strides = [geometry.offsets(4, stride)[1:] for stride in range(1, measure.LONGEST_LEAP + 1)]
    print(f"{'offsets':<12} " + " ".join(f"{positions:>9}" for positions in POSITIONS) + "   positions")
    counts: Counter[str] = Counter()
    for offsets in (*strides, *IRREGULAR):
        if not set(offsets) <= set(heads.config.offsets):
            parser.error(f"{args.model} has no heads for all of the offsets {offsets}")
        hits = measure.measure(model, heads.subset((1, *offsets)), rows)
        results = [result(hits[:, :, :positions], offsets) for positions in POSITIONS]
        counts.update(word.split()[0] for word in results)
        print(f"{','.join(map(str, offsets)):<12} " + " ".join(f"{word:>9}" for word in results))
    print(", ".join(f"{count} {word}" for word, count in counts.items()))


if __name__ == "__main__":
    main()
