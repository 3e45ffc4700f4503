"""What several tests share: tiny models, runs of LLaMA-Factory, decoding with known drafts, documents.

Imported by the top conftest.py before anything else, and therefore the place of the tests' environment variables.
"""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
# Threads that wait for each other cost tiny models more than they gain, on a busy machine most of all.
os.environ.setdefault("OMP_NUM_THREADS", "1")
