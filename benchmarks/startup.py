"""What the autoload hook costs every torch program: ``import torch`` with the plugin against without it.

    python benchmarks/startup.py [--repeats 15]

Both arms run in fresh processes, alternating, so that both see the same machine; medians are compared.
"""

import argparse
import os
import statistics
import subprocess
import sys


PROGRAM = "import time; t = time.perf_counter(); import torch; print(time.perf_counter() - t)"


def seconds(**environment: str) -> float:
    """Time of ``import torch`` in a fresh process."""
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return float(output.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    seconds()  # fills the file cache
    pairs = [(seconds(LMTP_FACTORY_DISABLE="1"), seconds(LMTP_FACTORY_DISABLE="0")) for _ in range(repeats)]
    without, with_plugin = (statistics.median(column) for column in zip(*pairs))
    print(f"import torch, plugin off: {1000 * without:8.1f} ms   (baseline)")
    print(f"import torch, plugin on:  {1000 * with_plugin:8.1f} ms")
    print(f"ratio: {with_plugin / without:.3f}")


if __name__ == "__main__":
    main()
