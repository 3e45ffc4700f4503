"""Training of comparison.py's arms: one stage 1 for all geometries, then a stage 2 for each arm, on equal data and steps."""

import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from lmtp_factory.distill.chat import load_tokenizer
from lmtp_factory.distill.rows import RESPONSE_COLUMN, dataset_entry, parse_ids
from lmtp_factory.evaluation.machine import describe
from lmtp_factory.evaluation.scoring import read_rows
from lmtp_factory.files import CONFIG_FILE, HEADS_FOLDER
from lmtp_factory.modeling.checkpoint import load_heads, save_heads


TRAIN = Path(__file__).with_name("comparison_train.yaml")
NTP = "NTP"  # the arm without heads


@dataclass
class Comparison:
    """A comparison in a folder. Whatever is finished there is kept.

    Attributes:
        model: Directory or hub id of the base model.
        folder: Where everything is written.
        settings: Contents of comparison.yaml.
    """

    model: str
    folder: Path
    settings: dict[str, Any]
    started: float = field(default_factory=time.time)

    def say(self, text: str) -> None:
        """Print a line with the minutes since the start."""
        print(f"[{(time.time() - self.started) / 60:5.1f} min] {text}", flush=True)

    def prepare(self) -> None:
        """Write the rows that all arms train on.

        Raises:
            SystemExit: The folder holds a comparison with other settings, files or machine, or another tokenizer wrote the
                rows.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        texts = [self.settings["train_rows"], self.settings["heldout_rows"], *self.settings["test"].values(), TRAIN]
        facts = {
            "model": self.model,
            "files": {str(file): hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in texts},
            "machine": describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            **self.settings,
        }
        path = self.folder / "settings.json"
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != facts:
            raise SystemExit(
                f"{path} has other settings, files or another machine: name another --output-dir or delete that one."
            )
        path.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        for file in (self.settings["train_rows"], self.settings["heldout_rows"]):
            check_rows(self.model, Path(file))
        lines = Path(self.settings["train_rows"]).read_text(encoding="utf-8").splitlines()
        rows = self.folder / "rows.jsonl"
        rows.write_text("\n".join(lines[: self.settings["max_train_rows"]]) + "\n", encoding="utf-8")
        (self.folder / "dataset_info.json").write_text(json.dumps({"rows": dataset_entry("rows.jsonl")}), "utf-8")

    def tokens_a_step(self) -> float:
        """Return the mean number of tokens, prompts included, of a training step."""
        train = yaml.safe_load(TRAIN.read_text(encoding="utf-8"))
        lengths = [
            min(len(prompt) + len(answer), train["cutoff_len"])
            for prompt, answer in read_rows(self.folder / "rows.jsonl")
        ]
        return train["per_device_train_batch_size"] * statistics.fmean(lengths)

    def stage1(self, name: str, inputs: str, offsets: Sequence[int], seed: int, keys: dict[str, Any]) -> Path:
        """Train heads on the frozen backbone.

        Args:
            name: Name of the run.
            inputs: Value of `head_inputs`.
            offsets: Offsets of the heads.
            seed: Seed of the run.
            keys: Keys of LLaMA-Factory that replace those of the settings' `stage1`.

        Returns:
            The output directory.
        """
        output = self.folder / f"stage1-{slug(name)}-{seed}"
        written = {
            "stage": "lmtp1",
            "finetuning_type": "full",
            "head_inputs": inputs,
            "leap_offsets": ",".join(map(str, offsets)),
            "draft_vocab_size": self.settings["draft_vocab_size"],
            "seed": seed,
        }
        if inputs != "layers":  # which a cache does not hold
            written["hidden_cache_dir"] = self.folder / "hidden"
        if inputs == "state_token":
            written["head_backs"] = self.settings["longest_leap"]
        self._train(output, {**written, **self.settings["stage1"], **keys})
        return output

    def heads_of(self, superset: Path, offsets: Sequence[int]) -> Path:
        """Write the heads at some offsets of a trained superset. Returns the directory that holds their `lmtp/`."""
        output = superset.with_name(f"{superset.name}-of-{'_'.join(map(str, offsets))}")
        if not (output / HEADS_FOLDER / CONFIG_FILE).is_file():
            save_heads(load_heads(str(superset)).subset((1, *offsets)), output / HEADS_FOLDER)
        return output

    def stage2(self, arm: str, heads: Path | None, seed: int, keys: dict[str, Any] | None = None) -> Path:
        """Tune the model with heads, or without (plain SFT).

        Args:
            arm: Name of the arm.
            heads: Directory of the heads to start from.
            seed: Seed of the run.
            keys: Keys of LLaMA-Factory that this arm adds.

        Returns:
            The output directory.
        """
        output = self.folder / f"stage2-{slug(arm)}-{seed}"
        stage = {"stage": "sft"} if heads is None else {"stage": "lmtp2", "stage1_pretrained_path": heads}
        self._train(output, {**stage, "seed": seed, **self.settings["stage2"], **(keys or {})})
        return output

    def _train(self, output: Path, keys: dict[str, Any]) -> None:
        """Train by llamafactory-cli, unless this has been done, and write what it took to `costs.json`."""
        if (output / "costs.json").is_file():
            return
        device = {"bf16": True} if torch.cuda.is_available() else {"use_cpu": True}
        written = {
            "model_name_or_path": self.model, "dataset": "rows", "dataset_dir": self.folder, "output_dir": output,
            **device, **keys,
        }  # fmt: skip
        command = [Path(sys.executable).with_name("llamafactory-cli"), "train", TRAIN]
        command += [f"{key}={value}" for key, value in written.items()]
        self.say(f"training {output.name}")
        log = output.with_suffix(".log")
        environment = {**os.environ, **self.settings["training_environment"]}
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"Training failed, see the end of {log}.")
        results = json.loads((output / "all_results.json").read_text(encoding="utf-8"))
        costs = {
            "seconds": results["train_runtime"],
            "steps per second": results["train_steps_per_second"],
            "peak MiB": usage.ru_maxrss / 1024,  # of the host; Linux counts KiB
        }
        (output / "costs.json").write_text(json.dumps(costs, indent=1), encoding="utf-8")


def check_rows(model: str, file: Path) -> None:
    """Check that rows hold token ids of the model's tokenizer: those of the first rows have to spell the rows' text.

    Raises:
        SystemExit: They do not.
    """
    tokenizer = load_tokenizer(model)
    for line in file.read_text(encoding="utf-8").splitlines()[:5]:
        row = json.loads(line)
        if tokenizer.decode(parse_ids(row[RESPONSE_COLUMN]), skip_special_tokens=True).strip() != row["output"].strip():
            raise SystemExit(
                f"{file} holds token ids of another tokenizer than {model}'s: write rows with lmtp-cli distill {model} and "
                "name them in train_rows and heldout_rows of the settings."
            )


def slug(name: str) -> str:
    """Return a name for a folder."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
