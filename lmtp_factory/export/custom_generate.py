"""`custom_generate/` of a heads export: plain transformers code decodes with the heads if this package is installed.

    model = AutoModelForCausalLM.from_pretrained(path)
    model.generate(**inputs, custom_generate=path, trust_remote_code=True)

The folder is written for `lmtp_export: custom_generate` only. It contains an import of this module and a requirements
file. The package is in no index: beside torch and transformers, `pip install --no-deps PATH` with the path of a checkout is
enough.
"""

import os
from pathlib import Path

from torch import Tensor, nn

from .. import __version__
from ..decoding import attach_heads
from ..modeling import heads_of, load_heads


FOLDER = "custom_generate"
_INSTALL = "lmtp_factory is in no package index: pip install --no-deps PATH, with the path of a checkout of it."
_LOADER = f'''"""Look-back decoding with the leap heads in lmtp/.

{_INSTALL}

    model = AutoModelForCausalLM.from_pretrained(path)
    model.generate(**inputs, custom_generate=path, trust_remote_code=True)

Loaded with trust_remote_code=True, model.generate always decodes with the heads. The output is the model's own.
"""

from lmtp_factory.export.custom_generate import generate


__all__ = ["generate"]
'''


def write_custom_generate(directory: str | os.PathLike) -> None:
    """Write `custom_generate/` into the directory of a heads export.

    Raises:
        OSError: A file cannot be written.
    """
    folder = Path(directory, FOLDER)
    folder.mkdir(exist_ok=True)
    (folder / "generate.py").write_text(_LOADER, encoding="utf-8")
    # transformers reads this file before generate.py: a line is a comment or one package with one version.
    (folder / "requirements.txt").write_text(f"# {_INSTALL}\nlmtp_factory>={__version__}\n", encoding="utf-8")


def generate(*inputs, model: nn.Module, **kwargs) -> Tensor:
    """Generate the same output as `model.generate` in fewer forwards.

    Args:
        inputs: Passed to `model.generate`.
        model: A model loaded from the export. Heads are attached at the first call.
        kwargs: Passed to `model.generate`. `lmtp_decode="off"` decodes without the heads.

    Raises:
        LMTPError: The model's directory has no heads, or heads of another model.
    """
    if heads_of(model) is None:
        attach_heads(model, heads=load_heads(model.config.name_or_path))
        model.leap_heads.requires_grad_(False).eval()
    return type(model).generate(model, *inputs, **kwargs)
