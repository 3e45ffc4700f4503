"""A Ray worker, which starts from nothing but pickled arguments, trains an L-MTP stage."""

import pytest
from helpers import llamafactory_runs as runs

from lmtp_factory.modeling.checkpoint import load_heads


def test_a_ray_worker_trains_the_heads(llama, data, tmp_path):
    ray = pytest.importorskip("ray")

    @ray.remote(num_cpus=1)
    def worker(config):
        from llamafactory.train import tuner  # what upstream's own Worker calls

        tuner._training_function(config)

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        ray.get(worker.remote({"args": runs.arguments(llama, data, tmp_path), "callbacks": []}), timeout=180)
    finally:
        ray.shutdown()
    assert "loss_head_3" in runs.history(tmp_path)[0]
    assert load_heads(tmp_path).config.num_heads == 3
