"""A program for torchrun: several trainings one after the other in the same processes, each from a file of arguments."""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from llamafactory.train.tuner import run_exp


if __name__ == "__main__":
    torch.distributed.destroy_process_group = lambda *args: None  # with which upstream ends a run
    for path in sys.argv[1:]:
        AcceleratorState._reset_state()  # which holds DeepSpeed's settings
        run_exp(json.loads(Path(path).read_text(encoding="utf-8")))
