"""`custom_generate/` of a heads export: lets transformers alone decode with the heads, where this package is installed.

    model = AutoModelForCausalLM.from_pretrained(path)
    model.generate(**inputs, custom_generate=path, trust_remote_code=True)

The folder is written on `lmtp_export: custom_generate` only. It holds an import of this module and the name of the
package, which `pip install --no-deps lmtp_factory` brings beside torch and transformers.
"""

import os
from pathlib import Path

from torch import Tensor, nn

from .. import __version__
from ..decoding import attach_heads
from ..modeling import heads_of, load_heads


FOLDER = "custom_generate"
_LOADER = '''"""Look-back decoding with the leap heads in lmtp/: pip install lmtp_factory.

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
        OSError: as the file system says.
    """
    folder = Path(directory, FOLDER)
    folder.mkdir(exist_ok=True)
    (folder / "generate.py").write_text(_LOADER, encoding="utf-8")
    (folder / "requirements.txt").write_text(f"lmtp_factory>={__version__}\n", encoding="utf-8")


def generate(*inputs, model: nn.Module, **kwargs) -> Tensor:
    """As `model.generate`, in fewer forwards; `lmtp_decode="off"` is stock.

    Args:
        model: loaded from the export, with heads attached or without.

    Raises:
        LMTPError: the directory that the model was loaded from holds no heads, or heads of another model.
    """
    if heads_of(model) is None:
        attach_heads(model, heads=load_heads(model.config.name_or_path))
        model.leap_heads.requires_grad_(False).eval()
    return type(model).generate(model, *inputs, **kwargs)
