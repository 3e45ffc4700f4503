"""Windows of an engine's requests against a simulated engine: pieces of prompts, rejections, preemption, cached prefixes."""

import random

import pytest
import torch

from lmtp_factory.serving.vllm import rows_of_step
from lmtp_factory.serving.windows import RequestWindows, Rows


SIZE = 3


def state(request, position):
    """A state that says whose it is: drafts that were rejected have no place in it."""
    return torch.tensor([float(request.number), float(position)])


class Request:
    """A request of the simulated engine.

    Attributes:
        known: Number of tokens of its text that are known.
        computed: Number of tokens whose keys and values exist.
        run: Number of the latest positions that steps have computed one after the other.
    """

    def __init__(self, number, prompt):
        self.number, self.prompt, self.known, self.computed, self.run = number, prompt, prompt, 0, 0


class Engine:
    """Schedules at random, as vLLM may, and counts what has to be in each window."""

    def __init__(self, seed):
        self.random, self.running, self.made = random.Random(seed), {}, 0
        self.drafts: dict[str, int] = {}

    def arrive(self):
        request = Request(self.made, self.random.randint(1, 12))
        if self.random.random() < 0.3:  # a prefix that another request has left
            request.computed = self.random.randint(0, request.prompt - 1)
        self.running[f"id {self.made % 7}"] = request  # ids come again
        self.made += 1

    def step(self):
        """Return a step's requests, tokens computed before it, rows, drafts and samples by request, and hidden states."""
        ids = [name for name in self.running if self.random.random() < 0.8]
        self.random.shuffle(ids)
        computed, scheduled, drafted, sampled, hidden = [], {}, {}, [], []
        for name in ids:
            request = self.running[name]
            computed.append(request.computed)
            missing = request.known - request.computed
            piece = self.random.randint(1, missing)
            drafts = self.random.randint(0, self.drafts.get(name, 0)) if piece == missing else 0
            scheduled[name] = piece + drafts
            if drafts:
                drafted[name] = drafts
            accepted = self.random.randint(0, drafts)
            positions = range(request.computed, request.computed + piece + drafts)
            hidden += [state(request, position) for position in positions[: piece + accepted]]
            hidden += [torch.full((2,), float("nan"))] * (drafts - accepted)
            sampled.append([1] * (accepted + 1) if piece == missing else [])
            request.computed += piece + accepted
            request.known += accepted + 1 if piece == missing else 0
            request.run += piece + accepted
        hidden += [torch.full((2,), float("nan"))] * self.random.randint(0, 4)  # padding
        return ids, computed, scheduled, drafted, sampled, torch.stack(hidden) if hidden else torch.zeros(0, 2)

    def disturb(self):
        """Let a request finish, or preempt it: it is computed again from its start or from a cached prefix."""
        for name in list(self.running):
            event = self.random.random()
            if event < 0.05:
                del self.running[name]
            elif event < 0.12:
                request = self.running[name]
                request.computed, request.run = self.random.randint(0, request.known - 1), 0


@pytest.mark.parametrize("seed", range(20))
def test_every_window_holds_the_last_states_that_were_computed_one_after_the_other(seed):
    engine, windows = Engine(seed), RequestWindows(SIZE, 2, 2, torch.float32, torch.device("cpu"))
    seen = set()
    for _ in range(150):
        if len(engine.running) < 5 and engine.random.random() < 0.5:
            engine.arrive()
        ids, computed, scheduled, drafted, sampled, hidden = engine.step()
        if not ids:
            continue
        if engine.random.random() < 0.1:  # vLLM asks for no drafts, for instance near the longest length
            for name in ids:
                engine.running[name].run = 0
        else:
            rows = rows_of_step(ids, computed, scheduled, drafted, sampled)
            filled = windows.push(rows, hidden, engine.running)
            window = windows.window(ids, range(len(ids)))
            assert window.roots.tolist() == list(range(len(ids)))
            real = torch.ones(len(ids), SIZE, dtype=torch.bool) if window.real is None else window.real
            for number, name in enumerate(ids):
                request = engine.running[name]
                count = min(SIZE, request.run)
                seen.add(count)
                # A request may go on where its window ended without having been computed in one piece. Its states are right.
                assert filled[number] == window.filled[number] == real[number].sum() >= count
                for back in range(filled[number]):
                    expected = state(request, request.computed - 1 - back)
                    assert window.states[number, SIZE - 1 - back].tolist() == expected.tolist()
        engine.drafts = {name: engine.random.randint(0, 4) for name in engine.running}
        engine.disturb()
    assert seen == {0, 1, 2, 3} or seen == {1, 2, 3}
    windows.keep({})
    assert len(windows._free) == len(windows._states) and not windows._entries


def test_an_id_that_comes_again_is_another_request():
    windows = RequestWindows(SIZE, 2, 1, torch.float32, torch.device("cpu"))
    windows.push([Rows("a", 0, 0, 4)], torch.arange(8.0).view(4, 2), {"a": Request(0, 4)})
    assert windows.push([Rows("a", 4, 0, 1)], torch.ones(1, 2), {"a": Request(1, 4)}) == [1]


def test_a_step_without_new_states_keeps_the_window():
    running, hidden = {"a": Request(0, 4)}, torch.arange(8.0).view(4, 2)
    windows = RequestWindows(SIZE, 2, 1, torch.float32, torch.device("cpu"))
    windows.push([Rows("a", 0, 0, 4)], hidden, running)
    assert windows.push([Rows("a", 4, 0, 0)], hidden, running) == [3]
    assert torch.equal(windows.window(["a"], [5]).states[0], hidden[1:])


def test_rows_of_a_step():
    """A piece of a prompt, a prompt's end, one draft of three accepted, all accepted, none."""
    rows = rows_of_step(
        ["piece", "end", "some", "all", "none"],
        [8, 0, 20, 30, 40],
        {"piece": 5, "end": 2, "some": 4, "all": 3, "none": 2},
        {"some": 3, "all": 2, "none": 1},
        [[], [7], [1, 2], [1, 2, 3], [4]],
    )
    assert rows == [
        Rows("piece", 8, 0, 5),
        Rows("end", 0, 5, 2),
        Rows("some", 20, 7, 2),
        Rows("all", 30, 11, 3),
        Rows("none", 40, 14, 1),
    ]
