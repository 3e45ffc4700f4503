"""What the autoload hook costs every torch program: the hook's time over that of `import torch`, in the same processes.

    python benchmarks/startup.py [--repeats 15]

torch is imported with the plugin off (the baseline), then the hook runs as torch would have run it; medians over fresh
processes are compared.
"""

import argparse
import os
import statistics
import subprocess
import sys


PROGRAM = """
import os, time
started = time.perf_counter()
import torch
imported = time.perf_counter()
os.environ["LMTP_FACTORY_DISABLE"] = "0"
from lmtp_factory.plugin.autoload import autoload
autoload()
print(imported - started, time.perf_counter() - imported)
"""


def seconds() -> tuple[float, float]:
    """Times of `import torch` and of the hook in a fresh process."""
    environment = os.environ | {"LMTP_FACTORY_DISABLE": "1"}
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    torch, hook = map(float, output.stdout.split())
    return torch, hook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    seconds()  # fills the file cache
    torch, hook = (statistics.median(column) for column in zip(*(seconds() for _ in range(repeats))))
    print(f"import torch, plugin off: {1000 * torch:8.1f} ms   (baseline)")
    print(f"the plugin's hook:        {1000 * hook:8.1f} ms")
    print(f"ratio of both to the baseline: {(torch + hook) / torch:.4f}")


if __name__ == "__main__":
    main()
