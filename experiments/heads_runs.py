"""Stage-1 runs of the experiments on heads: train once, then replay trees on the model's own answers."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from lmtp_factory.decoding.tree import chain_paths
from lmtp_factory.decoding.tree_config import DEFAULT_WIDTH, CostCurve
from lmtp_factory.distill.rows import PROMPT_COLUMN, RESPONSE_COLUMN, dataset_entry, format_ids
from lmtp_factory.evaluation.machine import describe
from lmtp_factory.evaluation.report import load_for_scoring
from lmtp_factory.evaluation.scoring import Row, read_rows
from lmtp_factory.evaluation.self_generated import read_prompts, self_generated_rows
from lmtp_factory.modeling.model import base_of
from lmtp_factory.tuning.costs import StepCosts, measure_costs
from lmtp_factory.tuning.replay import observe_answers, tau_of_dynamic, tau_of_paths
from lmtp_factory.tuning.tree_search import rank_trees


# The heads of the experiments that do not compare kinds of heads.
HEADS = {"head_inputs": "state_token", "head_kind": "own", "draft_vocab_size": 8192}
MOST_NODES = 16
CONFIG = Path(__file__).with_name("heads_stage1.yaml")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every experiment that trains heads by stage 1."""
    parser.add_argument("model", help="base model")
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="training rows of lmtp-cli distill")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--training-environment", action="append", default=[], metavar="NAME=VALUE", type=lambda text: text.split("=", 1),
        help="variable set for training and not for measuring, e.g. ONEDNN_DEFAULT_FPMATH_MODE=BF16",
    )  # fmt: skip
    add_test_options(parser)


def add_test_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the text that heads are tested on."""
    parser.add_argument(
        "--test", action="append", required=True, metavar="LABEL=FILE", type=lambda text: text.split("=", 1),
        help="prompts that nobody trained on; may be given several times",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--limit", type=int, default=32, help="prompts of each kind of text (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=128)


def train(args: argparse.Namespace, name: str, rows: list[Path], keys: dict) -> float:
    """Train heads unless the output of a run with the same settings is complete.

    Args:
        args: Options of the command.
        name: Name of the run and of its folder.
        rows: Files of training rows.
        keys: Keys added to `CONFIG`.

    Returns:
        The run's seconds, without those of filling the cache of hidden states.
    """
    model, output = str(Path(args.model).resolve()), args.output_dir / name
    done, made_with = output / "all_results.json", args.output_dir / f"{name}.json"
    if len({file.stem for file in rows}) < len(rows):
        raise SystemExit("Two files of rows have the same name: rename one.")
    facts = {"rows": {file.name: digest(file) for file in rows}, "seed": args.seed, "model": model, **keys}
    if environment := dict(args.training_environment):
        facts["environment"] = environment
    if made_with.is_file() and json.loads(made_with.read_text(encoding="utf-8")) != facts:
        raise SystemExit(f"{output} was trained with other settings ({made_with}): name another --output-dir.")
    if not done.is_file():
        data = args.output_dir / "data"
        data.mkdir(parents=True, exist_ok=True)
        names = {file.stem: dataset_entry(str(file.resolve())) for file in rows}
        (data / "dataset_info.json").write_text(json.dumps(names), encoding="utf-8")
        parts = [*(digest(file)[:8] for file in rows), *(f"{key}_{value}" for key, value in environment.items())]
        if "quantization_bit" in keys:
            parts.append(f"{keys['quantization_bit']}_bits")
        cache_dir = args.output_dir / f"hidden-{'-'.join(parts)}"
        written = {
            "model_name_or_path": model, "dataset": ",".join(names), "dataset_dir": data, "output_dir": output,
            "hidden_cache_dir": cache_dir, "seed": args.seed, **keys,
        }  # fmt: skip
        llamafactory = Path(sys.executable).with_name("llamafactory-cli")
        command = [llamafactory, "train", CONFIG, *(f"{key}={value}" for key, value in written.items())]
        made_with.write_text(json.dumps(facts), encoding="utf-8")
        variables = {**os.environ, **environment}
        filled = cache_dir.with_name(f"{cache_dir.name}.filled")
        if not filled.is_file():
            one_step = ["max_steps=1", f"output_dir={args.output_dir / 'filling'}"]
            subprocess.run([*map(str, command), *one_step], check=True, env=variables)
            filled.touch()
        subprocess.run([*map(str, command)], check=True, env=variables)
    return json.loads(done.read_text(encoding="utf-8"))["train_runtime"]


def measure(args: argparse.Namespace, name: str) -> dict:
    """Replay a run's heads on every kind of text.

    Returns:
        Number of parameters; time of a draft in plain steps; by kind of text, tau of the chain and of the dynamic tree of
        `MOST_NODES` nodes, and the best tree of at most so many nodes with its expected speed over plain steps.
    """
    model = base_of(load_for_scoring(str(args.output_dir / name)))
    costs, kinds = costs_of(args.output_dir, model), {}
    for label, file in args.test:
        observed = observe_answers(model, answers_to(args, model, label, file), DEFAULT_WIDTH)
        options = [option for option in rank_trees(observed, costs) if option.nodes <= MOST_NODES]
        best = max(options, key=lambda option: option.tokens_per_second)
        kinds[label] = {
            "chain": tau_of_paths(observed, chain_paths(model.leap_heads.config.offsets[-1])),
            "dynamic": tau_of_dynamic(observed, [MOST_NODES])[MOST_NODES],
            "x plain": best.tokens_per_second * costs.verify.at(1),
            "tree": f"{best.kind} {best.nodes}",
        }
    parameters = sum(parameter.numel() for parameter in model.leap_heads.parameters())
    return {"parameters": parameters, "draft": costs.draft / costs.verify.at(1), "text": kinds}


def report(args: argparse.Namespace, results: dict, path: Path) -> None:
    """Write the results so far, with the machine and the options that they depend on."""
    facts = {
        "machine": describe(torch.device("cpu")),
        "rows": [file.name for file in args.rows],
        "training environment": dict(args.training_environment),
        "seed": args.seed,
        "prompts of each kind": args.limit,
        "new tokens": args.max_new_tokens,
        "most nodes": MOST_NODES,
    }
    path.write_text(json.dumps(facts | results, indent=1), encoding="utf-8")


def in_words(kinds: dict[str, dict]) -> str:
    """Write the results of each kind of text in one line."""
    return "; ".join(
        f"{label}: {one['chain']:.2f}, {one['dynamic']:.2f}, {one['x plain']:.2f} ({one['tree']})"
        for label, one in kinds.items()
    )


def costs_of(folder: Path, model) -> StepCosts:
    """Time a draft. All runs of a folder share the first one's times of forwards, unless their heads read all layers."""
    kind = "layers" if model.leap_heads.config.reads_layers else "plain"
    path, costs = folder / f"verify_seconds_{kind}.json", measure_costs(model)
    if not path.is_file():
        path.write_text(json.dumps(costs.verify.seconds), encoding="utf-8")
    seconds = json.loads(path.read_text(encoding="utf-8"))
    return StepCosts(CostCurve({int(size): cost for size, cost in seconds.items()}), costs.draft)


def digest(file: Path) -> str:
    """Return a digest of a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def answers_to(args: argparse.Namespace, model, label: str, prompts_file: str) -> list[Row]:
    """Return the model's greedy answers to the prompts of a file, written once."""
    facts = f"{digest(Path(prompts_file))} {Path(args.model).resolve()}".encode()
    name = f"answers_{label}_{args.limit}x{args.max_new_tokens}_{hashlib.sha256(facts).hexdigest()[:8]}.jsonl"
    path = args.output_dir / name
    if not path.is_file():
        _, prompts = read_prompts(args.model, prompts_file, args.limit)
        lines = [
            json.dumps({PROMPT_COLUMN: format_ids(prompt), RESPONSE_COLUMN: format_ids(answer)})
            for prompt, answer in self_generated_rows(model, prompts, args.max_new_tokens)
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_rows(path)
