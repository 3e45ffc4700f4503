"""`lmtp-cli import`: what it says of a base model without weights. tests/convert runs the command."""

from types import SimpleNamespace

import pytest
from helpers import tiny_models

from lmtp_factory import LMTPConfig
from lmtp_factory.cli.import_heads import _measured
from lmtp_factory.errors import LMTPError


def test_measuring_needs_the_weights_of_the_base(tmp_path):
    base, text = tiny_models.save_llama(tmp_path / "base"), tmp_path / "text.txt"
    text.write_text("A frog leaps over two stones. " * 400)
    (base / "model.safetensors").unlink()
    heads = SimpleNamespace(config=LMTPConfig(num_heads=1, vocab_size=tiny_models.shape()["vocab_size"]))
    with pytest.raises(
        LMTPError, match=rf"The base model {base} cannot be loaded \(Error no file named .*\): measuring needs"
    ):
        _measured(str(base), heads, str(text))
