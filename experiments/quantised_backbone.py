"""What heads lose if stage 1 reads a quantised backbone: the same heads, trained on both, for the model in full precision.

    python experiments/quantised_backbone.py demo_run/model --rows data/self_distilled_smollm2_train.jsonl \\
        --test general=data/general_prompts.jsonl --steps 300 --output-dir quantised
"""

import argparse

from heads_runs import HEADS, MOST_NODES, add_options, in_words, measure, report, train


ARMS = {"full precision": {}, "4 bits": {"quantization_bit": 4}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()

    results = {}
    for arm, keys in ARMS.items():
        name = arm.replace(" ", "_")
        seconds = train(args, name, args.rows, {"max_steps": args.steps, **HEADS, **keys})
        results[arm] = {"train seconds": seconds, **measure(args, name)}
        report(
            args, {"steps": args.steps, "heads": HEADS, "arms": results}, args.output_dir / "quantised_backbone.json"
        )
    print(f"\n{'backbone of stage 1':<22} text: chain, dynamic {MOST_NODES}, x plain (tree)")
    for arm, result in results.items():
        print(f"{arm:<22} {in_words(result['text'])}")


if __name__ == "__main__":
    main()
