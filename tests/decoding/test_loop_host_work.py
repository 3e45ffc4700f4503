"""What a step asks of the host and of a GPU's bus: how often data crosses, and how many operations it takes.

A crossing is whatever would copy between host and device, or wait for the device, if the model were on a GPU. Upload:
``torch.tensor``, ``torch.as_tensor`` and ``Tensor.new_tensor`` (from Python numbers), and an index that holds a list.
Download: ``tolist``, ``cpu``, ``numpy``, an index that holds booleans, and the operators ``aten::_local_scalar_dense``
(below ``item``, ``int``, ``bool``, ``if``) and ``aten::nonzero``. On the CPU none of them costs anything, but all can be
counted. Nothing inside the backbone's forward counts, nor what the tests' oracle does, nor what is done once a call:
before the first step, and when the caller's cache is given its contents after the last.
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from helpers.decoding import GREEDY, TREES, assert_as_stock, decoded, oracle, padded, prompt, stock
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MaxTimeCriteria, set_seed

from lmtp_factory.decoding import loop, tree_builder
from lmtp_factory.decoding.accept import Acceptor
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.plugin.chat import ClientDisconnected


UPLOADS = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor}
DOWNLOADS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
DOWNLOADING = {"_local_scalar_dense", "nonzero"}
VIEWS = {
    "alias",
    "as_strided",
    "detach",
    "expand",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
}
VIEWS |= {"t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view", "lift_fresh"}


@dataclass
class Step:
    """From one forward of the backbone to the next."""

    uploads: int = 0
    downloads: int = 0
    operators: Counter = field(default_factory=Counter)

    @property
    def launched(self) -> Counter:
        """Operators that a GPU would run as kernels."""
        return Counter({name: count for name, count in self.operators.items() if name not in VIEWS})


class Counting:
    """Counts what happens in its context; :attr:`steps` are those between two forwards, the last one being the end."""

    def __init__(self, model):
        self.model, self.paused, self.seen = model, 0, [Step()]

    @property
    def steps(self) -> list[Step]:
        return self.seen[1:]

    @contextmanager
    def pause(self):
        self.paused += 1
        yield
        self.paused -= 1

    def _forward_begins(self, *_):
        self.paused += 1

    def _forward_ends(self, *_):
        self.paused -= 1
        self.seen.append(Step())

    @contextmanager
    def counting(self):
        counted = self

        class Functions(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if not counted.paused:
                    index = args[1] if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) else None
                    index = index if isinstance(index, tuple) else (index,)
                    listed = any(isinstance(part, list) for part in index)
                    boolean = any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in index)
                    counted.seen[-1].uploads += function in UPLOADS or listed
                    counted.seen[-1].downloads += function in DOWNLOADS or boolean
                return function(*args, **(kwargs or {}))

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if not counted.paused:
                    name = function._schema.name.partition("::")[2]
                    counted.seen[-1].operators[name] += 1
                    counted.seen[-1].downloads += name in DOWNLOADING
                return function(*args, **(kwargs or {}))

        backbone = self.model.base_model
        hooks = (
            backbone.register_forward_pre_hook(self._forward_begins),
            backbone.register_forward_hook(self._forward_ends),
        )
        try:
            with Functions(), Operators():
                yield self
        finally:
            for hook in hooks:
                hook.remove()


class Branches(DecodeStats):
    """Also keeps the lengths of each step's branches, one a row."""

    def __init__(self):
        super().__init__()
        self.lengths = []

    def count(self, nodes, branches):
        self.lengths.append([len(branch) for branch in branches])
        super().count(nodes, branches)


def mixed_ranks(row: int, place: int) -> int | None:
    return (0, 0, 1, 0, 0, 0, None, 0, 0, 2, 0)[(place + 5 * row) % 11]


def counted(model, inputs, plan, new=24, **kwargs):
    """The steps of a generation whose heads draft for nothing: an oracle's drafts replace theirs, uncounted."""
    kwargs |= {"max_new_tokens": new}
    set_seed(0)
    expected = stock(model, **inputs, **kwargs)
    assert_as_stock(model, prompt(), max_new_tokens=8, lmtp_tree=plan, **GREEDY)  # what is done once a model is done
    real, counter, stats = tree_builder.propose_candidates, Counting(model), Branches()
    with oracle(expected, mixed_ranks), pytest.MonkeyPatch.context() as patch:
        foretold = tree_builder.propose_candidates

        def both(*args, **kwargs):
            real(*args, **kwargs)
            with counter.pause():
                return foretold(*args, **kwargs)

        patch.setattr(tree_builder, "propose_candidates", both)
        set_seed(0)
        with counter.counting():
            ours = model.generate(**inputs, **kwargs, lmtp_tree=plan, lmtp_stats=stats)
    assert stats.strategy == "backward" and max(map(max, stats.lengths)) > 2
    if len(ours) == 1 or not kwargs["do_sample"]:
        assert ours.tolist() == expected.tolist()
    assert len(counter.steps) == len(stats.lengths) + 1  # the first follows the prefill
    return counter.steps, stats.lengths


HEADS = {"offsets": (2, 3, 6)}


@pytest.mark.parametrize("plan", ["chain", "static", "dynamic"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3-text"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_greedy_step_crosses_once_in_one_direction(leap, architecture, plan, rows):
    """Whatever the depth, the number of layers and of rows, and however many kinds of layers.

    Only that a row has ended, and others have not, is told to the device.
    """
    more = {"layer_types": ["sliding_attention", "full_attention"] * 3} if architecture == "gemma3-text" else {}
    model = leap(architecture, num_hidden_layers=6, heads=HEADS, **more)
    _, *steps, last = counted(model, padded([9, 2, 4][:rows]), TREES[plan], **GREEDY)[0]
    assert {step.downloads for step in (*steps, last)} == {1} and sum(step.uploads for step in steps) < rows


def test_prompts_shorter_than_the_window_cross_no_more(leap):
    model = leap("llama", heads={"num_heads": 2, "stride": 5})
    for inputs in ({"input_ids": prompt(1, 1)}, padded([2, 9])):
        _, *steps, _ = counted(model, inputs, TREES["dynamic"], **GREEDY)[0]
        assert {step.downloads for step in steps} == {1} and sum(step.uploads for step in steps) < len(
            inputs["input_ids"]
        )


@pytest.mark.parametrize(
    "kwargs", [{"max_time": 1e9}, {"stopping_criteria": [ClientDisconnected()]}], ids=["max_time", "client"]
)
def test_criteria_that_are_known_answer_on_the_host(leap, kwargs, monkeypatch):
    """``bool`` of what they say is no crossing, because it never was on the device."""
    model, devices = leap(), []
    kind = ClientDisconnected if "stopping_criteria" in kwargs else MaxTimeCriteria
    asked = kind.__call__
    monkeypatch.setattr(
        kind, "__call__", lambda self, ids, *args, **more: devices.append(ids) or asked(self, ids, *args)
    )
    acceptors = []
    monkeypatch.setattr(loop, "Acceptor", lambda *args: acceptors.append(Acceptor(*args)) or acceptors[-1])
    assert_as_stock(model, prompt(), max_new_tokens=9, **kwargs, **GREEDY)
    assert acceptors[0].on_device is None and len(acceptors[0].host_criteria) == 1
    assert devices[-1].data_ptr() == acceptors[0].sequences.data_ptr()


def with_two_memories(kind: type[Acceptor], made: list) -> type[Acceptor]:
    """``kind`` as on a GPU: what processors and custom criteria read is another tensor than the host's."""

    class TwoMemories(kind):
        def __init__(self, *args):
            super().__init__(*args)
            self.on_device = None if self.on_device is None else self.on_device.clone()
            made.append(self)

    return TwoMemories


def repeats(input_ids, scores, **kwargs):
    """Ends a row at a token that it has had before, late enough for the sequences to have grown."""
    return torch.tensor([len(row) > 80 and row[-1] in row[:-1] for row in input_ids.tolist()])


@pytest.mark.parametrize(
    "rows, settings",
    [
        (3, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
        (1, {"stopping_criteria": [repeats]}),
        (1, {"stopping_criteria": [repeats], "repetition_penalty": 1.1, "max_time": 1e9}),
    ],
    ids=["processors", "criterion", "both"],
)
def test_the_device_s_copy_of_the_sequences_keeps_up(leap, rows, settings, monkeypatch):
    model = leap("mistral", heads=HEADS)
    kwargs = {"max_new_tokens": 90} | settings | GREEDY
    expected, made = stock(model, **padded([9, 2, 4][:rows]), **kwargs), []
    with oracle(expected, mixed_ranks):
        monkeypatch.setattr(loop, "Acceptor", with_two_memories(loop.Acceptor, made))
        ours, stats = decoded(model, **padded([9, 2, 4][:rows]), **kwargs, lmtp_tree=TREES["dynamic"])
        monkeypatch.undo()
    assert ours.tolist() == expected.tolist() and len(ours[0]) > 80 and stats.tau > 1.3
    assert made[0].on_device.data_ptr() != made[0].sequences.data_ptr()
    for b, row in enumerate(made[0].rows):
        assert torch.equal(made[0].on_device[b, : row.length], made[0].sequences[b, : row.length])


@pytest.mark.parametrize("plan", ["chain", "static", "dynamic"])
@pytest.mark.parametrize("rows", [1, 3])
def test_operators_grow_with_layers_by_the_move_alone(leap, plan, rows):
    """Keys and values of a layer are read and written once each where a branch has to move; nothing else is by layer."""
    few, many, by_layers = 2, 7, {}
    for layers in (few, many):
        model = leap("llama", num_hidden_layers=layers, heads=HEADS)
        by_layers[layers] = counted(model, padded([9, 2, 4][:rows]), TREES[plan], **GREEDY)
    assert by_layers[few][1] == by_layers[many][1]
    moves = ("index_select", "index_copy_") if rows == 1 else ("gather", "scatter_")
    moved = 0
    for small, large in zip(by_layers[few][0], by_layers[many][0], strict=True):
        growth = large.launched - small.launched
        assert growth in (Counter(), Counter(dict.fromkeys(moves, 2 * (many - few))))
        moved += bool(growth)
    assert bool(moved) == (plan != "chain" or rows > 1)  # a chain's one branch lies where it belongs


def test_a_fixed_shape_is_worked_out_once(leap):
    """Later steps of a static tree neither walk up to ancestors nor number candidates again."""
    model = leap("mistral", heads=HEADS)
    first, *others = counted(model, {"input_ids": prompt()}, TREES["static"], new=40, **GREEDY)[0]
    assert first.operators["eye"] == 1 and not any(step.operators["eye"] for step in others)


@pytest.mark.parametrize(
    "settings", [{"top_k": 0}, {"top_k": 7, "repetition_penalty": 1.2}], ids=["one processor", "three processors"]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_sampling_reads_the_device_once_a_token_of_the_longest_branch(leap, settings, rows):
    """All rows' tokens of one place in their branches come together, the tree with the first of them."""
    model = leap("llama", num_hidden_layers=4, heads=HEADS)
    kwargs = {"do_sample": True, "temperature": 1e-3} | settings  # so cold that a batch draws what stock does
    (_, *steps), lengths = counted(model, padded([9, 2, 4][:rows]), TREES["dynamic"], **kwargs)
    assert {step.uploads for step in steps[:-1]} == {1}
    assert [step.downloads for step in steps] == [max(branches) for branches in lengths]


def test_processors_of_greedy_search_cost_the_same(leap):
    model = leap("llama", heads=HEADS)
    kwargs = {"repetition_penalty": 1.2} | GREEDY
    (_, *steps), lengths = counted(model, padded([9, 2]), TREES["dynamic"], **kwargs)
    assert {step.uploads for step in steps[:-1]} == {1}
    assert [step.downloads for step in steps] == [max(branches) for branches in lengths]


def test_what_the_counter_sees():
    """Each way to cross, so that the counts above can be believed."""
    counter = Counting(torch.nn.Module())
    counter.model.base_model = torch.nn.Identity()
    x = torch.arange(6.0)
    crossings = {
        lambda: torch.tensor([1, 2]): (1, 0),
        lambda: x.new_tensor([1.0]): (1, 0),
        lambda: x[[0, 1]]: (1, 0),
        lambda: x[None, [0, 1]]: (1, 0),
        lambda: x.tolist(): (0, 1),
        lambda: int(x[0]): (0, 1),
        lambda: bool(x.any()): (0, 1),
        lambda: x[x > 2]: (0, 1),
        lambda: x[1:3] + x.sum(): (0, 0),
    }
    for act, expected in crossings.items():
        with counter.counting():
            counter.model.base_model(x)
            act()
        assert (counter.seen[-1].uploads, counter.seen[-1].downloads) == expected
