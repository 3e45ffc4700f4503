"""Log lines in LLaMA-Factory's format, from rank 0 only."""


def info(message: str) -> None:
    """Log a line on rank 0."""
    _logger().info_rank0(message)


def warning(message: str) -> None:
    """Log a warning on rank 0."""
    _logger().warning_rank0(message)


def _logger():
    from llamafactory.extras import logging

    # Levels and handlers belong to upstream's root logger, so the logger has to be its child.
    return logging.get_logger("llamafactory.lmtp")
