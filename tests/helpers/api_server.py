"""`llamafactory-cli api` in a process of its own."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from helpers import llamafactory_runs as runs


@contextmanager
def running_api(model: Path, folder: Path, **environment: str) -> Iterator[tuple[str, Path]]:
    """Serve a model greedily.

    Args:
        model: its directory.
        folder: for the YAML and the log.
        environment: more variables of the server.

    Returns:
        The URL, which ends in /v1, and the log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = {"model_name_or_path": str(model), "template": "qwen", "do_sample": False}
    env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "MAX_CONCURRENT": "2"}
    env |= {"API_HOST": "127.0.0.1", "API_PORT": str(port), "API_VERBOSE": "0"} | environment
    command = [str(runs.BIN / "llamafactory-cli"), "api", runs.write_yaml(folder / "api.yaml", args)]
    url, log = f"http://127.0.0.1:{port}/v1", folder / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=os.environ | env, stdout=file, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None:
            try:
                httpx.get(f"{url}/models", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        assert process.poll() is None, log.read_text()[-4000:]
        yield url, log
    finally:
        process.terminate()
        process.wait(30)
