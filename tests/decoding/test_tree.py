"""Draft trees against brute force: which paths they keep, in which order, and who sees whom."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtp_factory.decoding.tree import Tree, assumed_accuracies, best_first_paths, chain_paths, fixed, grow


PROBABILITY = st.one_of(st.sampled_from([0.0, 1e-30, 0.5, 1.0]), st.floats(2**-10, 1.0, width=32))


@st.composite
def probabilities(draw, rows=3):
    """Nested lists (rows, levels, width), falling with the rank."""
    levels, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    level = st.lists(PROBABILITY, min_size=width, max_size=width).map(lambda p: sorted(p, reverse=True))
    row = st.lists(level, min_size=levels, max_size=levels)
    return draw(st.lists(row, min_size=1, max_size=rows))


@st.composite
def shapes(draw):
    """Parents and levels of a random tree."""
    parents, levels = [0], [0]
    for node in range(1, draw(st.integers(1, 24))):
        # Mostly the node before: deep trees are the ones that need care.
        parents.append(draw(st.one_of(st.just(node - 1), st.integers(0, node - 1))))
        levels.append(levels[parents[-1]] + 1)
    return parents, levels


def all_paths(accuracies):
    """Every path but the root's, with the product of its accuracies."""
    for length in range(1, len(accuracies) + 1):
        for path in itertools.product(*(range(len(level)) for level in accuracies[:length])):
            yield path, math.prod(accuracies[level][rank] for level, rank in enumerate(path))


def paths_of(tree: Tree, row: int) -> list[tuple[int, ...]]:
    paths = [()]
    for node in range(1, tree.nodes):
        parent = int(tree.parents[row, node])
        assert parent < node, "a child stands before its parent"
        paths.append((*paths[parent], int(tree.ranks[row, node])))
    return paths


@given(probabilities(), st.integers(2, 20))
@settings(max_examples=150, deadline=None)
def test_grow_keeps_the_best_paths(rows, nodes):
    tree = grow(torch.tensor(rows), nodes)
    for row, accuracies in enumerate(rows):
        worth = dict(all_paths(accuracies))
        paths = paths_of(tree, row)
        best = sorted(worth.values(), reverse=True)[: nodes - 1]
        kept = [worth[path] for path in paths[1:]]
        assert len(set(paths)) == tree.nodes == len(best) + 1
        # Each level costs a child a thousandth of its value, so near ties may go either way.
        assert sorted(kept, reverse=True) == pytest.approx(best, rel=0.01, abs=1e-20)
        assert kept == pytest.approx(sorted(kept, reverse=True), rel=0.01, abs=1e-20)
        assert tree.levels[row].tolist() == [len(path) for path in paths]
        assert tree.height >= max(len(path) for path in paths)
        values = tree.values[row].tolist()
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx([1.0, *kept], rel=0.01, abs=1e-20)


@given(probabilities(rows=2), st.integers(2, 20), st.data())
@settings(max_examples=50, deadline=None)
def test_the_first_nodes_of_a_tree_are_a_tree(rows, nodes, data):
    tree = grow(torch.tensor(rows), nodes)
    count = data.draw(st.integers(1, tree.nodes))
    small = tree.first(count)
    assert small.nodes == count and small.values.shape[1] == count
    assert small.levels.max() <= small.height < count  # a branch has no more nodes than the tree
    for row in range(len(rows)):
        assert paths_of(small, row) == paths_of(tree, row)[:count]


def test_heads_that_overflow_do_not_break_the_tree():
    broken = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)).sort(-1, descending=True).values
    broken[0, 1] = broken[1, :, 1] = float("nan")
    broken[1, 2] = float("inf")
    tree = grow(broken, 12)
    for row in range(2):
        paths = paths_of(tree, row)
        assert len(set(paths)) == 12 and all(path[:-1] in paths[:node] for node, path in enumerate(paths) if path)
        assert tree.levels[row].tolist() == [len(path) for path in paths]


@given(probabilities(rows=1), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_best_first_paths_are_the_best(rows, nodes):
    accuracies = rows[0]
    worth = dict(all_paths(accuracies)) | {(): 1.0}
    paths = best_first_paths(accuracies, nodes)
    best = sorted(worth.values(), reverse=True)[:nodes]
    assert [worth[path] for path in paths] == pytest.approx(best, rel=1e-9)
    assert paths[0] == () and len(set(paths)) == len(paths)
    assert fixed(paths).nodes == len(paths)  # parents stand before their children
    assert all(path[-1] == 0 or (*path[:-1], path[-1] - 1) in paths for path in paths[1:])


def test_assumed_accuracies_fall_with_the_level_and_the_rank():
    levels = assumed_accuracies(20)
    assert len(levels) == 20 and {len(level) for level in levels} == {8}
    assert all(sum(level) < 1 and level == sorted(level, reverse=True) for level in levels)
    assert [level[0] for level in levels] == sorted((level[0] for level in levels), reverse=True)
    assert best_first_paths(assumed_accuracies(2), 4) == [(), (0,), (1,), (0, 0)]


def test_best_first_paths_of_no_levels():
    assert best_first_paths([], 5) == [()]


@given(st.lists(shapes(), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_ancestors(rows):
    nodes = min(len(parents) for parents, _ in rows)
    parents, levels = (torch.tensor([row[part][:nodes] for row in rows]) for part in (0, 1))
    tree = Tree(parents, levels, torch.zeros_like(parents), height=int(levels.max()))
    expected = torch.zeros(len(rows), nodes, nodes, dtype=torch.bool)
    for row in range(len(rows)):
        for node in range(nodes):
            above = node
            while True:
                expected[row, node, above] = True
                if above == 0:
                    break
                above = int(parents[row, above])
    assert torch.equal(tree.ancestors(), expected)


def test_a_fixed_tree():
    tree = fixed([(), (0,), (1,), (0, 2), (0, 2, 1)])
    assert tree.parents.tolist() == [[0, 0, 0, 1, 3]]
    assert tree.levels.tolist() == [[0, 1, 1, 2, 3]]
    assert tree.ranks.tolist() == [[0, 0, 1, 2, 1]]
    assert tree.height == 3 and tree.values is None
    assert tree.first(3).parents.tolist() == [[0, 0, 0]]
    assert chain_paths(3) == [(), (0,), (0, 0)]


@pytest.mark.parametrize(
    "paths, message",
    [
        ([], "starts with its root"),
        ([(0,), ()], "starts with its root"),
        ([(), (0,), (1, 0)], r"parent of path \(1, 0\)"),
        ([(), (0, 0), (0,)], r"parent of path \(0, 0\)"),
    ],
)
def test_paths_that_are_no_tree_are_refused(paths, message):
    with pytest.raises(ValueError, match=message):
        fixed(paths)


@given(probabilities(), st.integers(2, 9))
@settings(max_examples=30, deadline=None)
def test_tokens_of_a_tree(rows, nodes):
    batch, height, width = len(rows), len(rows[0]), len(rows[0][0])
    candidates = torch.arange(batch * height * width).reshape(batch, height, width)
    roots = -1 - torch.arange(batch)
    grown = grow(torch.tensor(rows), nodes)
    shared = fixed(paths_of(grown, 0))
    for tree in (grown, shared, grown.first(1)):
        tokens = tree.tokens(roots, candidates)
        assert tokens.shape == (batch, tree.nodes)
        for row in range(batch):
            paths = paths_of(tree, row if tree is not shared else 0)
            expected = [int(candidates[row, len(path) - 1, path[-1]]) for path in paths[1:]]
            assert tokens[row].tolist() == [int(roots[row]), *expected]
