"""Everything that only a GPU shows, in parts that are kept: losses, training stages, trained heads, decoding.

    PYTHONPATH=. python benchmarks/gpu.py demo_run/model --output-dir gpu_run      # make gpu
    python benchmarks/gpu_report.py gpu_run

Needs torch and transformers only, and no installation of this package; arms of other packages are left out where these are
missing. Each part writes one JSON file. After --minutes no new part begins, and the same command goes on with what is
missing. With --toy, or on a machine without CUDA, every part runs at toy size.
"""

import argparse
import hashlib
import json
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo
from gpu_parts import decoding, heads, loss, stages
from gpu_parts.settings import Settings

from lmtp_factory.evaluation.machine import describe


DATA = Path(__file__).resolve().parents[1] / "data"
STEPS = {"loss": loss, "stages": stages, "heads": heads, "decoding": decoding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of the base model")
    parser.add_argument("--rows", type=Path, default=DATA / "self_distilled_smollm2_train.jsonl")
    parser.add_argument("--heldout", type=Path, default=DATA / "self_distilled_smollm2_heldout.jsonl")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--minutes", type=float, default=5, help="no part begins after so many (default: 5)")
    parser.add_argument("--toy", action="store_true", help="every part at toy size, to try the command")
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    toy = args.toy or device.type == "cpu"
    settings = Settings(args.model, args.rows, args.heldout, args.output_dir, device, toy)
    keep_facts(settings)
    # A model that compiles again and again would run eager in the end, and be measured as compiled.
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 64, True
    started, left, failed = time.monotonic(), 0, []
    for step in args.steps:
        for name, run in STEPS[step].parts(settings).items():
            path = args.output_dir / f"{step}-{name}.json"
            if path.is_file():
                continue
            if time.monotonic() - started > 60 * args.minutes:
                left += 1
                continue
            print(f"{step} {name} ...", flush=True)
            began = time.monotonic()
            torch._dynamo.reset()
            try:
                found = {**run(), "seconds of the part": time.monotonic() - began}
            except Exception:  # the other parts are worth their time all the same
                traceback.print_exc()
                failed.append(f"{step} {name}")
                continue
            written = path.with_suffix(".writing")
            written.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            written.rename(path)
            print(f"{step} {name}: {found['seconds of the part']:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"These parts failed, see above: {', '.join(failed)}. {left} others are left.")
    print(f"{left} parts are left: run the same command again." if left else "All parts are done.")


def keep_facts(settings: Settings) -> None:
    """Write what the parts depend on, or compare it with what earlier parts were made with.

    Raises:
        SystemExit: They were made with something else.
    """
    model = Path(settings.model)
    weights = sorted(model.glob("*.safetensors"))
    if not weights:
        raise SystemExit(f"{model} has no *.safetensors: name the directory of a model.")
    facts = {"machine": describe(settings.device), "toy": settings.toy}
    for path in (model / "config.json", *weights, settings.rows, settings.heldout):
        with path.open("rb") as file:
            facts[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    settings.folder.mkdir(parents=True, exist_ok=True)
    path = settings.folder / "facts.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != facts:
        raise SystemExit(f"{path} names another machine, model or text: name another --output-dir.")
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
