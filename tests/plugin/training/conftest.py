"""Fixtures of the trainer's tests."""

import pytest


@pytest.fixture
def trainers(monkeypatch):
    """Trainers that were built while the test ran."""
    from lmtp_factory.plugin.training import trainer

    built, init = [], trainer.LeapTrainer.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        built.append(self)

    monkeypatch.setattr(trainer.LeapTrainer, "__init__", remember)
    return built
