"""Per-head metrics in ``trainer_log.jsonl``, whose writer knows a fixed list of keys (``llamafactory.train.callbacks``)."""

import functools
import re
from types import ModuleType

from . import hooks


HEAD_METRIC = re.compile(r"(?:.+_)?(?:loss|acc)_head_\d+")


def head_metrics(logs: dict[str, float]) -> dict[str, float]:
    """The per-head entries of a Trainer log: ``loss_head_1``, ``acc_head_1``, ``eval_loss_head_1``, ..."""
    return {key: value for key, value in logs.items() if HEAD_METRIC.fullmatch(key)}


def extend_callbacks(callbacks: ModuleType) -> None:
    """Replace ``LogCallback`` by a subclass that adds the per-head metrics to each line."""
    upstream = hooks.expect(callbacks, "LogCallback")
    hooks.expect(upstream, "_write_log", "output_dir", "logs")

    class LogCallback(upstream):
        __doc__ = upstream.__doc__

        def on_log(self, args, state, control, **kwargs):
            # Upstream hands self._write_log to a thread; bind this call's metrics to it rather than keep them around.
            write_log = super()._write_log
            metrics = head_metrics(state.log_history[-1])
            self._write_log = functools.partial(_write_with, write_log, metrics)
            super().on_log(args, state, control, **kwargs)

    callbacks.LogCallback = LogCallback


def _write_with(write_log, metrics: dict[str, float], output_dir: str, logs: dict) -> None:
    write_log(output_dir, logs | metrics)
