"""The comparison that the paper leaves open: MTP, leaping and rising heads on equal data, steps and seeds.

One stage 1 per kind of inputs and seed trains heads at all offsets. Each arm takes its own offsets of them and is tuned in a
stage 2. Everything that is finished is kept: the same command continues. The page is written by comparison_page.py.

    python experiments/comparison.py --output-dir results_run --page docs/results.md
"""

import argparse
import json
from pathlib import Path

import torch
import yaml
from comparison_measure import answers_of, measure, perplexity, timed
from comparison_page import write_page
from comparison_training import NTP, Comparison

from lmtp_factory.demo.smollm2 import prepare
from lmtp_factory.evaluation.machine import describe
from lmtp_factory.evaluation.report import load_for_scoring
from lmtp_factory.evaluation.self_generated import read_prompts
from lmtp_factory.modeling.model import base_of
from lmtp_factory.tuning.head_subsets import rank_subsets


SETTINGS = Path(__file__).with_name("comparison.yaml")


def stage1_of(run: Comparison, arm: dict, seed: int) -> Path:
    """Return the output of the stage 1 that trains an arm's heads. Arms with the same settings share it."""
    if "stage1" in arm:
        keys = " ".join(f"{key} {value}" for key, value in arm["stage1"].items())
        return run.stage1(
            f"{arm['inputs']} {arm['offsets']} {keys}", arm["inputs"], arm["offsets"], seed, arm["stage1"]
        )
    return run.stage1(arm["inputs"], arm["inputs"], run.settings["superset"], seed, {})


def offsets_of(run: Comparison, arm: dict) -> list[int]:
    """Return an arm's offsets: those of its settings, or the fastest subset of the first seed's heads."""
    if "offsets" in arm:
        return arm["offsets"]
    path = run.folder / f"selected-{arm['inputs']}-{arm['num_heads']}.json"
    if not path.is_file():
        run.say(f"choosing {arm['num_heads']} of the heads that read {arm['inputs']}")
        model = base_of(load_for_scoring(str(stage1_of(run, arm, run.settings["seeds"][0]))))
        # Prompts of the training rows: the arms are tested on others.
        prompts = read_prompts(run.model, run.settings["train_rows"], run.settings["test_prompts"])[1]
        rows = answers_of(model, prompts, run.settings["max_new_tokens"], kept=None)
        ranked = rank_subsets(model, rows, arm["num_heads"])
        path.write_text(json.dumps([subset.offsets[1:] for subset in ranked]), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))[0]


def measure_arms(run: Comparison) -> dict:
    """Train and measure every arm with every seed, then time each arm's first seed, one after the other.

    Heads on the frozen backbone are timed. A tuned model has the same shape when its adapter is merged.
    """
    settings, arms = run.settings, {}
    folders: dict[str, Path] = {}
    for name, arm in settings["arms"].items():
        offsets, seeds = offsets_of(run, arm), {}
        for seed in settings["seeds"]:
            heads = run.heads_of(stage1_of(run, arm, seed), offsets)
            tuned = run.stage2(name, heads, seed, arm.get("stage2"))
            folders.setdefault(name, heads)
            seeds[seed] = {
                "frozen": measure(run, heads, heads.with_suffix(".json"), frozen=True),
                "joint": measure(run, tuned, tuned.with_suffix(".json"), frozen=False),
                "training": json.loads((tuned / "costs.json").read_text(encoding="utf-8")),
            }
        arms[name] = {**arm, "offsets": offsets, "seeds": seeds}
    for name, arm in arms.items():
        heads, forward = folders[name], name == settings.get("forward")
        path = heads.with_name(f"{heads.name}-times{'-forward' * forward}.json")
        arm["times"] = timed(run, heads, path, next(iter(arm["seeds"].values()))["frozen"]["text"], forward)
    return arms


def measure_plain(run: Comparison) -> dict:
    """Tune the model without heads with every seed, and measure its perplexity and the base model's."""
    path, seeds = run.folder / "plain.json", {}
    for seed in run.settings["seeds"]:
        tuned = run.stage2(NTP, None, seed)
        seeds[seed] = {"training": json.loads((tuned / "costs.json").read_text(encoding="utf-8"))}
    if not path.is_file():
        found = {
            folder: perplexity(run, base_of(load_for_scoring(folder, offsets=(1, 2))))
            for folder in (run.model, *(str(run.stage2(NTP, None, seed)) for seed in seeds))
        }
        path.write_text(json.dumps(list(found.values())), encoding="utf-8")
    base, *tuned = json.loads(path.read_text(encoding="utf-8"))
    for seed, value in zip(seeds, tuned):
        seeds[seed]["perplexity"] = value
    return {"base perplexity": base, "seeds": seeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model (default: SmolLM2-135M-Instruct, made in the output directory)")
    parser.add_argument("--settings", type=Path, default=SETTINGS, help="YAML of settings (default: comparison.yaml)")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="also write this Markdown page, with its plot beside it")
    parser.add_argument("--findings", type=Path, help="Markdown file that ends the page")
    args = parser.parse_args()
    if args.findings and not args.findings.is_file():
        parser.error(f"{args.findings} does not exist")

    model = args.model or str(prepare(args.output_dir.resolve() / "model"))
    run = Comparison(model, args.output_dir.resolve(), yaml.safe_load(args.settings.read_text(encoding="utf-8")))
    run.prepare()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "machine": describe(device),
        "model": Path(args.model).name if args.model else "SmolLM2-135M-Instruct",
        "settings file": args.settings.name,
        "settings": run.settings,
        "tokens a step": run.tokens_a_step(),
        "plain": measure_plain(run),
        "arms": measure_arms(run),
    }
    # Through JSON, so that the page sees what is read back from the file.
    path = run.folder / "comparison.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    run.say(f"Written: {path}")
    if args.page:
        write_page(json.loads(path.read_text(encoding="utf-8")), args.page, args.findings)
        run.say(f"Written: {args.page}")


if __name__ == "__main__":
    main()
