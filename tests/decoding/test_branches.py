"""Branches that the device finds, against a walk in plain Python."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtp_factory.decoding.branches import Branches, follow
from lmtp_factory.decoding.tree import Tree, fixed, grow


WORDS = 4  # few, so that drafts and choices often agree


def plain_walk(chosen: list[int], tokens: list[int], parents: list[int]) -> list[int]:
    branch = [0]
    while True:
        right = [
            node for node in range(1, len(tokens)) if parents[node] == branch[-1] and tokens[node] == chosen[branch[-1]]
        ]
        if not right:
            return branch
        branch.append(right[0])


def check(tree: Tree, batch: int, seed: int) -> int:
    """Compare for random candidates and choices. Returns the length of the longest branch."""
    generator = torch.Generator().manual_seed(seed)
    levels = max(tree.height, 1)
    candidates = torch.rand(batch, levels, WORDS, generator=generator).argsort(-1)  # each level's are all different
    roots = torch.randint(WORDS, (batch,), generator=generator)
    tokens = tree.tokens(roots, candidates)
    chosen = torch.randint(WORDS, (batch, tree.nodes), generator=generator)
    branches, read = follow(chosen, tokens, tree)
    nodes, counts, appended = branches.nodes, branches.counts, read[:, tree.height + 2 :]
    assert nodes.shape == appended.shape == (batch, tree.height + 1)
    assert torch.equal(read[:, : tree.height + 2], torch.cat([counts, nodes], dim=1))
    parents = tree.parents.expand(batch, -1).tolist()
    for b in range(batch):
        branch = plain_walk(chosen[b].tolist(), tokens[b].tolist(), parents[b])
        assert int(counts[b]) == len(branch)
        assert nodes[b].tolist() == branch + [0] * (tree.height + 1 - len(branch))
        assert appended[b, : len(branch)].tolist() == chosen[b, branch].tolist()
        assert int(branches.roots[b]) == int(chosen[b, branch[-1]])
    rows = torch.arange(batch)[:, None] > 0  # the first has ended
    branches, read = follow(chosen, tokens, tree, rows)
    assert torch.equal(read[:, :1], counts * rows) and torch.equal(branches.counts, counts * rows)
    return int(counts.max())


@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 5),
    nodes=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_the_device_follows_the_model_down_a_tree_of_each_row_s_own(batch, height, nodes, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(batch, height, WORDS, generator=generator).sort(-1, descending=True).values
    tree = grow(probabilities / WORDS, nodes)
    assert 1 <= check(tree, batch, seed) <= tree.height + 1


def test_and_down_trees_that_all_rows_share():
    trees = [
        fixed([()]),
        fixed([(0,) * level for level in range(5)]),
        fixed([(), (1,), (0,), (1, 2), (0, 0), (1, 2, 3)]),
    ]
    longest = [max(check(tree, 3, seed) for seed in range(60)) for tree in trees]
    assert longest[0] == 1 and min(longest[1:]) > 2


def test_branches_of_the_host_are_filled_up():
    sent = Branches.sent([[0, 2, 5], [], [0]], [7, 8, 9], torch.device("cpu"))
    assert sent.nodes.tolist() == [[0, 2, 5], [0, 0, 0], [0, 0, 0]]
    assert sent.counts.tolist() == [[3], [0], [1]] and sent.roots.tolist() == [7, 8, 9]
