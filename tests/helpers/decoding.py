"""What the decoder's tests share: models whose tokens depend on all of their past, and drafts that know the answer."""

import logging
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lmtp_factory.decoding import loop, support, tree_builder
from lmtp_factory.decoding.accept import Acceptor
from lmtp_factory.decoding.draft import Candidates
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.tree import best_first_paths
from lmtp_factory.decoding.tree_config import CostCurve, TreeConfig


PATHS = tuple(best_first_paths([[0.6, 0.2, 0.1], [0.5, 0.2, 0.1], [0.4, 0.2], [0.3, 0.1]], 12))
TREES = {
    "chain": TreeConfig("chain", 5, always=True),
    "static": TreeConfig("static", 12, paths=PATHS, always=True),
    "dynamic": TreeConfig("dynamic", 9, width=3, always=True),
    "with cost": TreeConfig("dynamic", 9, width=3, cost=CostCurve({1: 1.0, 4: 1.05, 64: 3.0}), always=True),
}
# Rising offsets without gaps to speak of, with one that leaps far, and the strides.
GEOMETRIES = {
    "stride 1": {"num_heads": 3, "stride": 1},
    "stride 2": {"num_heads": 3, "stride": 2},
    "stride 3": {"num_heads": 2, "stride": 3},
    "rising": {"offsets": (2, 3, 6)},
}


def enlarge_weights(model, scale: float = 10.0) -> None:
    """Weights so large that every token depends on all tokens before it, as those of a trained model do.

    A freshly initialised model tends to repeat itself, whatever it is given, and would hide most errors.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name and "wte" not in name:
                parameter.mul_(scale)


def prompt(rows: int = 1, length: int = 9, seed: int = 0) -> Tensor:
    """(rows, length) token ids, none of them special."""
    return torch.randint(20, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: Iterable[int], seed: int = 0) -> dict[str, Tensor]:
    """A batch of prompts of these lengths, padded on the left."""
    lengths = list(lengths)
    ids = prompt(len(lengths), max(lengths), seed)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def stock(model, *args, **kwargs):
    """What transformers alone generates."""
    return model.generate(*args, lmtp_decode="off", **kwargs)


def decoded(model, *args, **kwargs):
    """What we generate, and what the stats say; an obstacle is a failure."""
    stats = DecodeStats()
    output = model.generate(*args, lmtp_stats=stats, **kwargs)
    assert stats.strategy in ("backward", "forward"), stats.strategy
    return output, stats


def assert_as_stock(model, *args, lmtp_tree: TreeConfig = TREES["dynamic"], lmtp_decode: str = "backward", **kwargs):
    """Assert that we generate what stock generates; the token ids and the stats."""
    expected = stock(model, *args, **kwargs)
    ours, stats = decoded(model, *args, lmtp_tree=lmtp_tree, lmtp_decode=lmtp_decode, **kwargs)
    assert ours.tolist() == expected.tolist()
    return ours, stats


@contextmanager
def oracle(continuations: Tensor, rank: Callable[[int, int], int | None] = lambda row, place: 0, seed: int = 0):
    """Inside, drafts propose the tokens of ``continuations`` (rows, length) and not what the heads say.

    Args:
        rank: (row, place in the sequence) -> the rank that the right token is proposed at; None, or a rank that the
            draft does not have: only wrong tokens are proposed.
    """
    acceptors = []

    class Recorded(Acceptor):
        def __init__(self, *args):
            super().__init__(*args)
            acceptors.append(self)

    generator = torch.Generator().manual_seed(seed)

    def propose(model, window, levels: int, width: int, *_) -> Candidates:
        rows, vocabulary = acceptors[-1].rows, model.config.get_text_config().vocab_size
        tokens = torch.empty(len(rows), levels, width, dtype=torch.long)
        for b, row in enumerate(rows):
            for level in range(levels):
                place = row.length + level
                right = int(continuations[b, place]) if place < continuations.shape[1] else -1
                first = int(torch.randint(vocabulary, (), generator=generator))
                proposed = [(first + i) % vocabulary for i in range(width + 1)]
                proposed = [token for token in proposed if token != right]
                at = rank(b, place) if right >= 0 else None
                if at is not None:
                    proposed.insert(at, right)
                tokens[b, level] = torch.tensor(proposed[:width])
        probabilities = torch.rand(tokens.shape, generator=generator).sort(-1, descending=True).values
        return Candidates(tokens, probabilities / probabilities.sum(-1, keepdim=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Acceptor", Recorded)
        patch.setattr(tree_builder, "propose_candidates", propose)
        yield acceptors


GREEDY = {"do_sample": False}
CHAIN, DYNAMIC = TREES["chain"], TREES["dynamic"]
OTHER_SEARCH = "beam search, assisted and other special generation has no look-back"


def mixed_ranks(row: int, place: int) -> int | None:
    return (0, 0, 1, 0, None, 0, 2)[(place + 3 * row) % 7]


def assert_as_stock_with_drafts(model, inputs, plan=DYNAMIC, rank=mixed_ranks, new=24, **kwargs):
    """Equal to stock with branches of all lengths accepted; ours, and the stats.

    ``kwargs`` may hold functions, which are called for every generation: for objects that collect what they see.
    """
    whole = stock(model, **inputs, max_new_tokens=new, **GREEDY)
    settings = {"max_new_tokens": new} | GREEDY | kwargs
    expected = stock(model, **inputs, **{k: v() if callable(v) else v for k, v in settings.items()})
    with oracle(whole, rank):
        settings = {k: v() if callable(v) else v for k, v in settings.items()}
        ours, stats = decoded(model, **inputs, lmtp_tree=plan, **settings)
    assert ours.tolist() == expected.tolist()
    return ours, stats


def after_prompt(output, inputs) -> list[list[int]]:
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def assert_left_to_stock(model, reason, caplog, *args, expected=None, **kwargs):
    """As stock, and the log says why, once for any number of calls."""
    support.warn_once.cache_clear()
    stats, outputs = DecodeStats(), []
    if expected is None:
        expected = stock(model, *args, **kwargs)
    with caplog.at_level(logging.WARNING, logger="lmtp_factory"):
        for _ in range(2):
            outputs.append(model.generate(*args, lmtp_stats=stats, **kwargs))
    said = [record.message for record in caplog.records if record.name.startswith("lmtp_factory")]
    assert said == [f"Decoding without leap heads: {reason}."]
    assert (stats.strategy, stats.stock_reason) == ("off", reason) and stats.tokens == 0
    for output in outputs:
        ours, theirs = (getattr(o, "sequences", o) for o in (output, expected))
        assert torch.equal(ours, theirs)
    return outputs[0]
