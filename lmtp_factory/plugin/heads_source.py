"""Where the leap heads of a run come from.

The source is resolved once per run, when LLaMA-Factory has parsed the arguments (see `seams/hparams/parser.py`), and kept as
`finetuning_args.heads_source`. Validation, loader, workflow, Trainer and chat read it there.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .. import geometry
from ..config import LMTPConfig
from ..errors import LMTPError
from ..modeling.checkpoint import base_fingerprint, find_heads, read_config, state_size
from . import log
from .resume import choose_checkpoint


@dataclass(frozen=True)
class BaseModel:
    """Files of the model that the heads belong to.

    Attributes:
        path: Directory or Hugging Face id. A model of another hub is downloaded, and `path` is its directory.
        options: What upstream passes to `from_pretrained` with it.
    """

    path: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model_args) -> "BaseModel":
        """The model that `model_name_or_path` names."""
        from llamafactory.extras.misc import try_download_model_from_other_hub

        options = {
            "trust_remote_code": model_args.trust_remote_code,
            "cache_dir": model_args.cache_dir,
            "revision": model_args.model_revision,
            "token": model_args.hf_hub_token,
        }
        return cls(try_download_model_from_other_hub(model_args), options)

    def config(self) -> PretrainedConfig:
        """Configuration of the model."""
        return AutoConfig.from_pretrained(self.path, **self.options)

    def fingerprint(self) -> str | None:
        """Fingerprint of the model's tokenizer; None if it has none."""
        return base_fingerprint(self.path, **self.options)

    def heads_at(self, path: str) -> Path | None:
        """The `lmtp/` folder of the model or an adapter; None without one. Upstream loads both from `revision`."""
        return find_heads(path, revision=self.options.get("revision"), **self._access())

    def named_heads(self, path: str) -> Path | None:
        """The `lmtp/` folder of `stage1_pretrained_path`; None without one. `revision` does not apply to it."""
        return find_heads(path, **self._access())

    def _access(self) -> dict[str, Any]:
        return {"token": self.options.get("token"), "cache_dir": self.options.get("cache_dir")}


@dataclass(frozen=True)
class HeadsSource:
    """The heads that a run trains, exports or decodes with.

    Attributes:
        base: The model that they belong to.
        folder: The `lmtp/` folder that holds them. None if they are fresh.
        config: Their configuration; of fresh heads as they will be on `base`. Size and fingerprint of the vocabulary are
            None while new tokens have to be added. None for heads that `lmtp_export: ntp` leaves out.
        resumed: The checkpoint that training resumes from.
        packs_batches: Whether stage 1 packs the documents of each batch, because `packing` was left out.
        exports: Whether the run is an export.
        draft_tokens: The draft vocabulary of fresh heads, which the workflow adds when it has loaded the training set.
    """

    base: BaseModel
    folder: Path | None
    config: LMTPConfig | None
    resumed: Path | None = None
    packs_batches: bool = False
    exports: bool = False
    draft_tokens: tuple[int, ...] | None = None

    @property
    def reach(self) -> int:
        """Offset of the last head."""
        return geometry.reach(self.config.offsets)


def resolve_training(model_args, data_args, training_args, finetuning_args) -> HeadsSource | None:
    """The source of an L-MTP stage's heads, or of heads that only predict; None for other stages.

    Raises:
        LMTPError: A path that has to hold heads or a checkpoint does not; the hub cannot be asked.
    """
    stage = finetuning_args.lmtp_stage
    if stage is None:
        only_predicts = training_args.predict_with_generate and not training_args.do_train
        return _resolve_decoding(model_args, finetuning_args) if only_predicts else None
    resumed, base = choose_checkpoint(training_args), BaseModel.of(model_args)
    folder = _stage_heads(base, model_args, training_args, finetuning_args, resumed)
    if folder is None and not training_args.do_train:
        raise LMTPError(
            "There are no leap heads to evaluate: name the output of a finished stage in stage1_pretrained_path or "
            "adapter_name_or_path."
        )
    config = _fresh_config(base, finetuning_args) if folder is None else read_config(folder)
    # Facts that are known only when the model and the run's tokenizer are loaded.
    adds_tokens = model_args.resize_vocab or model_args.add_tokens or model_args.add_special_tokens
    if adds_tokens:
        config.vocab_size = None
    if adds_tokens or (stage == 2 and finetuning_args.finetuning_type != "lora"):  # the template may add tokens too
        config.tokenizer_fingerprint = None
    packs_batches = stage == 1 and data_args.packing is None  # upstream replaces None by False later
    return HeadsSource(base, folder, config, resumed, packs_batches)


def resolve_inference(model_args, finetuning_args, exports: bool) -> HeadsSource | None:
    """The source of the heads that chat and api decode with or an export concerns; None without heads.

    Raises:
        LMTPError: The heads' configuration cannot be read; the hub cannot be asked for heads that a key asks for.
    """
    if not exports:
        return _resolve_decoding(model_args, finetuning_args)
    base = BaseModel.of(model_args)
    try:
        folder = _inference_heads(base, model_args, finetuning_args)
    except LMTPError as error:
        if finetuning_args.lmtp_export != "ntp" or finetuning_args.lmtp_stage or finetuning_args.stage1_pretrained_path:
            raise
        log.warning(f"{error} Exporting as a model without leap heads.")
        return None
    if folder is None:
        return None
    # An NTP export works with damaged heads too.
    config = None if finetuning_args.lmtp_export == "ntp" else read_config(folder)
    return HeadsSource(base, folder, config, exports=True)


def decoding_obstacle(model_args, finetuning_args) -> str | None:
    """The first key, as YAML spells it, that keeps upstream's `generate` from decoding with heads; None without one."""
    backend = getattr(model_args.infer_backend, "value", model_args.infer_backend)
    if backend != "huggingface":
        return f"infer_backend: {backend}"
    if finetuning_args.stage != "sft":
        return f"stage: {finetuning_args.stage}"
    if model_args.use_unsloth:
        return "use_unsloth"
    if model_args.use_kt:
        return "use_kt"
    return "mixture_of_depths" if model_args.mixture_of_depths is not None else None


def _resolve_decoding(model_args, finetuning_args) -> HeadsSource | None:
    decode = finetuning_args.lmtp_decode
    if decode == "off" or decoding_obstacle(model_args, finetuning_args) is not None:
        return None
    base = BaseModel.of(model_args)
    try:
        folder = _inference_heads(base, model_args, finetuning_args)
    except LMTPError as error:
        if decode != "auto":
            raise
        log.warning(f"{error} Decoding without leap heads.")
        return None
    return None if folder is None else HeadsSource(base, folder, read_config(folder))


def _stage_heads(base: BaseModel, model_args, training_args, finetuning_args, resumed: Path | None) -> Path | None:
    """Heads that a stage trains from or evaluates; None for fresh ones.

    In stage 2 an adapter that is tuned further or evaluated has heads of its own. Otherwise `stage1_pretrained_path`
    decides, then the model directory.
    """
    stage, named = finetuning_args.lmtp_stage, finetuning_args.stage1_pretrained_path
    adapters = reversed(model_args.adapter_name_or_path or []) if stage == 2 else []
    if (of_adapter := next(filter(None, map(base.heads_at, adapters)), None)) is not None:
        return of_adapter
    if named is None:
        return base.heads_at(base.path)
    # The release's stage-1 files name their own output, which is empty before the first run. Any other path is a mistake.
    is_own_output = os.path.realpath(named) == os.path.realpath(training_args.output_dir)
    may_be_empty = stage == 1 and is_own_output and training_args.do_train
    # A path such as out/stage1 could be a hub id too, but an output that does not exist yet is not looked for on the hub.
    if (found := None if may_be_empty and not os.path.isdir(named) else base.named_heads(named)) is not None:
        return found
    if not may_be_empty:
        fresh = " to start from fresh heads" if training_args.do_train else ""
        raise LMTPError(
            f"stage1_pretrained_path {named} has no lmtp/ folder: name the output_dir of a finished stage 1, or leave the "
            f"key out{fresh}."
        )
    heads = base.heads_at(base.path)
    start = resumed or ("fresh ones" if heads is None else f"those in {heads}")
    log.info(f"stage1_pretrained_path {named} has no heads yet: stage 1 starts from {start}.")
    return heads


def _inference_heads(base: BaseModel, model_args, finetuning_args) -> Path | None:
    """Heads of the last adapter, else of the model directory, else of `stage1_pretrained_path`."""
    named, last_adapter = finetuning_args.stage1_pretrained_path, (model_args.adapter_name_or_path or [])[-1:]
    found = next(filter(None, map(base.heads_at, [*last_adapter, base.path])), None)
    return base.named_heads(named) if found is None and named is not None else found


def _fresh_config(base: BaseModel, finetuning_args) -> LMTPConfig:
    text_config = base.config().get_text_config()
    reads_layers = finetuning_args.head_inputs == "layers"
    return finetuning_args.heads_config(
        hidden_size=state_size(text_config),
        vocab_size=text_config.vocab_size,
        base_layers=text_config.num_hidden_layers if reads_layers else None,
        base_model=base.path,
        tokenizer_fingerprint=base.fingerprint(),
    )
