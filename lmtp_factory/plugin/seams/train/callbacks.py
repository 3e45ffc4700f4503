"""Writes per-head metrics to `trainer_log.jsonl`, whose upstream writer knows a fixed list of keys."""

import functools
from types import ModuleType

from ... import hooks
from ...training.head_metrics import heads_metrics


def extend(callbacks: ModuleType) -> None:
    """Replace `LogCallback` by a subclass that adds the per-head metrics to each line."""
    upstream = hooks.expect(callbacks, "LogCallback")
    hooks.expect(upstream, "_write_log", "output_dir", "logs")

    class LogCallback(upstream):
        __doc__ = upstream.__doc__

        def on_log(self, args, state, control, **kwargs):
            # Upstream hands self._write_log to a thread, so the function itself has to hold this call's metrics.
            write_log = super()._write_log
            metrics = {str(metric): value for metric, value in heads_metrics(state.log_history[-1]).items()}
            self._write_log = functools.partial(_write_with, write_log, metrics)
            super().on_log(args, state, control, **kwargs)

    callbacks.LogCallback = LogCallback


def _write_with(write_log, metrics: dict[str, float], output_dir: str, logs: dict) -> None:
    write_log(output_dir, logs | metrics)
