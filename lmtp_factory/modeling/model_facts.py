"""Facts that identify the model whose hidden states are cached, in a form that an error message can show."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

from transformers import PretrainedConfig


# Samples read from each weight file. Reading all of a large model would take minutes.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def model_facts(base: str, config: PretrainedConfig) -> dict[str, str]:
    """Return the configuration's hash, the hub commit, and the size, modification time and samples of each weight file.

    Size and modification time detect changes that the samples miss, such as an edited norm. A copy that does not preserve
    times (`cp` without `-p`, a new download) counts as another model.

    Args:
        base: Model directory or hub id. A hub id has a commit and no files.
        config: The model's configuration, loaded from `base`.
    """
    values = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    facts = {"configuration": _digest(json.dumps(values, sort_keys=True, default=str).encode())}
    commit = getattr(config, "_commit_hash", None)
    if commit is not None:
        facts["commit"] = commit
    for path in sorted(Path(base).glob("*.safetensors")) or sorted(Path(base).glob("*.bin")):
        status = path.stat()  # follows the symbolic links of a hub snapshot
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
