"""Keys that do not go with heads that read all layers (`head_inputs: layers`)."""

from accelerate.utils import convert_bytes

from ...config import LMTPConfig
from ...errors import LMTPError
from .shard_layout import DTYPE


def check_layer_keys(config: LMTPConfig, training_args, finetuning_args) -> None:
    """Check the keys of a run whose heads read all layers, before anything loads.

    Args:
        config: Configuration of the heads.
        training_args: Upstream's arguments.
        finetuning_args: Upstream's arguments with the L-MTP keys.

    Raises:
        LMTPError: A key does not go with such heads.
    """
    if finetuning_args.hidden_cache_dir is not None:
        states = f"{config.base_layers} states of {config.hidden_size} x {DTYPE.itemsize} bytes"
        size = config.base_layers * config.hidden_size * DTYPE.itemsize
        raise LMTPError(
            f"hidden_cache_dir does not go with head_inputs: layers, because {states} would be kept of each token "
            f"({size:,} bytes, {convert_bytes(size * 10**6)} a million tokens): leave hidden_cache_dir out, or write "
            "head_inputs: state."
        )
    if training_args.torch_compile:
        raise LMTPError(
            "torch_compile does not go with head_inputs: layers, because a compiled backbone does not show its inner "
            "layers: leave it out, or write head_inputs: state."
        )
