"""`make results-quick` runs whole and again from what it has finished; what its page says follows from the numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture
def page(monkeypatch):
    """The module of the experiments that writes the page."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import comparison_page

    return comparison_page


@pytest.mark.slow
def test_the_quick_comparison(smollm2, tmp_path):
    command = [
        sys.executable, "experiments/comparison.py", "--settings", "experiments/comparison_quick.yaml",
        "--model", smollm2, "--output-dir", tmp_path / "run", "--page", tmp_path / "results.md",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, timeout=1200)
    found = json.loads((tmp_path / "run" / "comparison.json").read_text(encoding="utf-8"))
    assert found["plain"]["base perplexity"] > 1
    for arm in found["arms"].values():
        (seed,) = arm["seeds"].values()
        for stage in ("frozen", "joint"):
            text = seed[stage]["text"]["arithmetic and code"]
            assert len(text["top-1"]) == arm["offsets"][-1] - 1
            for sizes in text["tau"].values():
                assert sizes["1"] == 1 <= sizes["4"] <= 4
        assert seed["joint"]["perplexity"] == pytest.approx(found["plain"]["base perplexity"], rel=0.05)
        assert seed["training"]["peak MiB"] > 100
        assert (
            arm["times"]["seconds"]["1"] > 0
            and arm["times"]["decoded"]["arithmetic and code"]["backward"]["tokens per second"] > 0
        )
    assert len(found["arms"]["conditioned rising"]["offsets"]) == 2
    written = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert all(written.count(f"| {name} |") >= 3 for name in found["arms"])
    assert "with one seed, which says nothing about noise" in written
    assert (tmp_path / "results_tau.png").stat().st_size > 5_000

    trained = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("costs.json"))
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("costs.json")) == trained
    assert json.loads((tmp_path / "run" / "comparison.json").read_text(encoding="utf-8")) == found


def test_a_mean_has_its_spread(page):
    assert page.spread([1.0, 2.0, 3.0]) == "2.00 (1.00 to 3.00)"
    assert page.spread([1234.5], digits=0) == "1,234"


@pytest.mark.parametrize(
    ("ours", "theirs", "noise", "words"),
    [
        ([2.0, 2.2], [1.0, 1.2], 0, "a has 1.91 times the tau of b, beyond the spread of the seeds"),
        ([1.0, 1.3], [1.2, 1.4], 0, "a and b do not differ in tau beyond the spread of the seeds (ratio 0.88)"),
        ([1.0, 3.0], [1.8, 2.0], 0, "a and b do not differ in tau beyond the spread of the seeds (ratio 1.05)"),
        ([2.0], [1.0], 0, "a has 2.00 times the tau of b, with one seed, which says nothing about noise"),
        ([1.0, 1.1], [1.2, 1.3], 0.2, "a and b do not differ in tau beyond what timing varies by (ratio 0.84)"),
        ([2.0, 2.2], [1.0, 1.2], 0.2, "a has 1.91 times the tau of b, beyond the spread of the seeds"),
    ],
)
def test_a_difference_within_the_spread_is_none(page, ours, theirs, noise, words):
    assert page.verdict("a", ours, "b", theirs, "tau", noise) == words
