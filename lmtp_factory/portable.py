"""``custom_generate/`` of a heads export: this package's decoder as plain files that transformers loads by itself.

transformers copies ``custom_generate/generate.py`` and the files that it imports from the same folder, nothing deeper. So
the modules that decoding needs are written side by side, their imports of each other shortened to match.
"""

import os
import re
import shutil
from pathlib import Path

from . import __version__


FOLDER = "custom_generate"
# Names of files have to differ; the decoder's is that of transformers' entry.
_RENAMED = {"decoding/generate": "decode"}
_MODULES = {
    module: _RENAMED.get(module, module.rpartition("/")[2])
    for module in (
        "errors",
        "files",
        "geometry",
        "config",
        "modeling/dtypes",
        "modeling/zero3",
        "modeling/loss/targets",
        "modeling/loss/softmax",
        "modeling/loss/path",
        "modeling/loss/eager",
        "modeling/loss/chunked",
        "modeling/heads",
        "modeling/trial",
        "modeling/logits_proof",
        "modeling/checkpoint",
        "modeling/lmtp",
        "modeling/attach",
        "decoding/tree",
        "decoding/cache",
        "decoding/packed",
        "decoding/strategies",
        "decoding/plan",
        "decoding/stats",
        "decoding/draft",
        "decoding/drafter",
        "decoding/verify",
        "decoding/accept",
        "decoding/stream",
        "decoding/obstacles",
        "decoding/generate",
    )
}
_ENTRY = '''"""Look-back decoding with the leap heads in lmtp/, written by lmtp_factory {version}. MIT licence.

    model = AutoModelForCausalLM.from_pretrained(path)
    model.generate(**inputs, custom_generate=path, trust_remote_code=True)

Or load with trust_remote_code=True: model.generate then always decodes with the heads. Output is the model's own.
"""

# transformers copies the files named here.
{imports}


def generate(*inputs, model, **kwargs):
    """As ``model.generate``, in fewer forwards; ``lmtp_decode="off"`` is stock."""
    if not isinstance(model, LeapModel):
        attach_heads(model, heads=load_heads(model.config.name_or_path))
        model.leap_heads.requires_grad_(False).eval()
    return type(model).generate(model, *inputs, **kwargs)
'''


def write_custom_generate(directory: str | os.PathLike) -> None:
    """Write ``custom_generate/`` into a model directory, replacing what is there."""
    folder = Path(directory, FOLDER)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = Path(__file__).parent
    for module, name in _MODULES.items():
        text = (source / f"{module}.py").read_text(encoding="utf-8")
        (folder / f"{name}.py").write_text(_flattened(text), encoding="utf-8")
    named = {"lmtp": "LeapModel", "attach": "attach_heads", "checkpoint": "load_heads"}
    imports = [f"from .{name} import {named[name]}" for name in sorted(named)]
    imports += [f"from .{name} import __name__ as _{name}" for name in sorted(_MODULES.values()) if name not in named]
    (folder / "generate.py").write_text(
        _ENTRY.format(version=__version__, imports="\n".join(imports)), encoding="utf-8"
    )


def _flattened(text: str) -> str:
    """Relative imports of other folders, turned into ones of the same folder."""

    def shortened(match: re.Match) -> str:
        path = (match["path"] or "").lstrip(".").replace(".", "/")
        candidates = [module for module in _MODULES if path and (module == path or module.endswith(f"/{path}"))]
        return f"from .{_MODULES[candidates[0]] if candidates else ''} import "

    return re.sub(r"from \.+(?P<path>[\w.]*) import ", shortened, text)
