"""Log lines in LLaMA-Factory's own format, once per run and not once per rank."""


def info(message: str) -> None:
    """A line for rank 0's log."""
    _logger().info_rank0(message)


def warning(message: str) -> None:
    """A warning in rank 0's log."""
    _logger().warning_rank0(message)


def _logger():
    from llamafactory.extras import logging

    # Levels and handlers sit on upstream's root logger; only its children are heard.
    return logging.get_logger("llamafactory.lmtp")
