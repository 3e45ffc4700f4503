"""What decides a model's hidden states, as facts that two runs can compare and an error message can repeat."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

from transformers import PretrainedConfig


# Of each weight file. Reading all of a large model takes minutes.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def model_facts(base: str, config: PretrainedConfig) -> dict[str, str]:
    """Configuration, commit on the hub, and every weight file's size, time of change and samples of its content.

    Size and time see what the samples miss, an edited norm for instance. A copy that does not keep times (`cp` without
    `-p`, a new download) counts as another model.

    Args:
        base: model directory or hub id; an id has its commit instead of files.
        config: of the model, as loaded from there.
    """
    values = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    facts = {"configuration": _digest(json.dumps(values, sort_keys=True, default=str).encode())}
    commit = getattr(config, "_commit_hash", None)
    if commit is not None:
        facts["commit"] = commit
    for path in sorted(Path(base).glob("*.safetensors")) or sorted(Path(base).glob("*.bin")):
        status = path.stat()  # of the blob behind a hub snapshot's link
        seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
        facts[path.name] = (
            f"{status.st_size:,} bytes, changed {datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}."
            f"{nanoseconds:09d} UTC, sampled {_samples(path, status.st_size)}"
        )
    return facts


def _samples(path: Path, size: int) -> str:
    content = bytearray()
    with open(path, "rb") as file:
        for sample in range(_SAMPLES):
            file.seek(size * sample // _SAMPLES)
            content += file.read(_SAMPLE_BYTES)
    return _digest(content)


def _digest(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
