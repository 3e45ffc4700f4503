"""A program for torchrun: several trainings one after the other in the same processes, each from a file of arguments."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from llamafactory.train.tuner import run_exp


if __name__ == "__main__":
    # Upstream destroys the process group after each run. The next run needs it.
    destroy, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda *args: None
    for path in sys.argv[1:]:
        AcceleratorState._reset_state()  # It keeps the DeepSpeed settings of the last run.
        run_exp(json.loads(Path(path).read_text(encoding="utf-8")))
    torch.distributed.barrier()
    destroy()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        0
    )  # Threads of the process group that DeepSpeed still holds abort the interpreter's teardown now and then.
