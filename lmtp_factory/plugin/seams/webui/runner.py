"""Adds the L-MTP keys to the Board's commands and saved arguments, and shows refusals first."""

import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from ....errors import LMTPError
from ... import hooks
from ...stages import STAGES
from ...webui.fields import ALL_FIELDS, stage_of, train_arguments
from ...webui.runs import holds_only_heads
from ...webui.texts import alert


# The last line of a traceback, with or without torchrun's prefix.
_REFUSAL = re.compile(rf"\b{LMTPError.__name__}: (.+)")


def extend(module: ModuleType) -> None:
    """Replace `Runner` by a subclass that knows the L-MTP keys."""
    upstream = hooks.expect(module, "Runner")
    hooks.expect(upstream, "_initialize", "data", "do_train", "from_preview")
    hooks.expect(upstream, "_parse_train_args", "data")
    hooks.expect(upstream, "_parse_eval_args", "data")
    hooks.expect(upstream, "_build_config_dict", "data")
    hooks.expect(upstream, "monitor")
    get_trainer_info = hooks.expect(module, "get_trainer_info", "lang", "output_path", "do_train")

    class Runner(upstream):
        __doc__ = upstream.__doc__
        _log_start = 0  # bytes of the log that earlier runs have written

        def _value(self, data: dict, id: str) -> Any:
            return data[self.manager.get_elem_by_id(id)]

        def _lmtp_stage(self, data: dict) -> int | None:
            return stage_of(data.get(self.manager.get_elem_by_id("train.training_stage")))

        def _initialize(self, data, do_train, from_preview):
            error = super()._initialize(data, do_train, from_preview)
            if not from_preview:
                log = self._log(data, do_train)
                self._log_start = log.stat().st_size if log.is_file() else 0
            stage = self._lmtp_stage(data) if do_train else None
            if error or stage is None:
                return error
            return self._refusal(data, stage)

        def _output_dir(self, data: dict, do_train: bool) -> Path:
            tab = "train" if do_train else "eval"
            ids = ("top.model_name", "top.finetuning_type", f"{tab}.output_dir")
            return Path(module.get_save_dir(*(self._value(data, id) for id in ids)))

        def _log(self, data: dict, do_train: bool) -> Path:
            """The file to which LLaMA-Factory 0.9.6 appends the output of each run in a directory."""
            return self._output_dir(data, do_train) / "webui_subprocess.log"

        def _written(self, data: dict, do_train: bool, shown: str) -> str:
            """What this run has written, of which `shown` has the end."""
            log = self._log(data, do_train)
            if not log.is_file():
                return shown
            with log.open("rb") as file:
                file.seek(self._log_start)
                return file.read().decode("utf-8", errors="replace")

        def _refusal(self, data: dict, stage: int) -> str:
            from llamafactory.hparams import FinetuningArguments

            keys = train_arguments(self.manager, data, stage)
            keys.pop("warmup_ratio", None)  # a key of the Trainer
            try:
                FinetuningArguments(stage=STAGES[stage], **keys)
            except LMTPError as error:
                return f"{alert('lmtp_refused', self._value(data, 'top.lang'))} {error}"
            return ""

        def _parse_train_args(self, data):
            args = super()._parse_train_args(data)
            stage = self._lmtp_stage(data)
            if stage is None:
                return args
            # `args` holds the extra arguments, which have priority.
            args |= {k: v for k, v in train_arguments(self.manager, data, stage).items() if k not in args}
            if stage == 1 and not args.get("packing"):
                args.pop("packing", None)  # stage 1 packs its batches if the key is left out
            return self._with_base(args, data)

        def _parse_eval_args(self, data):
            return self._with_base(super()._parse_eval_args(data), data)

        def _with_base(self, args: dict, data: dict) -> dict:
            chosen = args["model_name_or_path"]
            if holds_only_heads(chosen):  # upstream takes it for a model
                args |= {
                    "model_name_or_path": self._value(data, "top.model_path"),
                    "stage1_pretrained_path": args.get("stage1_pretrained_path", chosen),
                }
            return args

        def _build_config_dict(self, data):
            config = super()._build_config_dict(data)
            if self._lmtp_stage(data) is None:  # a Board without the plugin loads it too
                for key in ALL_FIELDS:
                    config.pop(f"train.{key}", None)
            return config

        def monitor(self):
            data, do_train = self.running_data, self.do_train
            output_box = self.manager.get_elem_by_id(f"{'train' if do_train else 'eval'}.output_box")
            for update in super().monitor():
                if isinstance(shown := update.get(output_box), str) and _REFUSAL.search(shown):
                    written = self._written(data, do_train, shown)
                    update[output_box] = refusal_first(shown, self._value(data, "top.lang"), written)
                yield update
            if do_train and self._lmtp_stage(data) is not None:
                # Upstream updates the plot every two seconds, but not at the end.
                folder = os.fspath(self._output_dir(data, do_train))
                info = get_trainer_info(self._value(data, "top.lang"), folder, do_train)[2]
                if "loss_viewer" in info:
                    yield {self.manager.get_elem_by_id("train.loss_viewer"): info["loss_viewer"]}

    Runner.__module__, Runner.__qualname__ = upstream.__module__, upstream.__qualname__
    module.Runner = Runner


def refusal_first(shown: str, language: str, written: str | None = None) -> str:
    """The output of a failed run with its last refusal in front, if there is one.

    Args:
        shown: What the Board shows.
        language: The Board's language.
        written: What the run has written, if the Board may show the output of earlier runs too.
    """
    found = _REFUSAL.findall(shown if written is None else written)
    return f"**{alert('lmtp_refused', language)}** {found[-1]}\n\n{shown}" if found else shown
