"""The walk down the trees: which tokens a step adds, where rows end, and what processors and criteria are shown."""

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import EosTokenCriteria

from lmtp_factory.decoding.accept import Acceptor
from lmtp_factory.decoding.tree import Tree, fixed


WORDS = 10
# Two candidates for the first place and two below the first of them.
TREE = fixed([(), (0,), (1,), (0, 0), (0, 1), (0, 0, 0)])


def acceptor(prompts, processors=(), criteria=(), **config) -> Acceptor:
    lists = LogitsProcessorList(processors), StoppingCriteriaList(criteria)
    return Acceptor(torch.tensor(prompts), *lists, GenerationConfig(**config))


def says(tokens) -> torch.Tensor:
    """(batch, nodes, vocabulary) logits whose argmax at each node is the token given."""
    return 8.0 * torch.nn.functional.one_hot(torch.tensor(tokens), WORDS).float()


def goes_on(accept: Acceptor) -> torch.Tensor:
    return torch.tensor([[not row.done] for row in accept.rows])


def walk(accept: Acceptor, next_tokens, drafted, tree: Tree = TREE) -> list[list[int]]:
    """The branches of a step."""
    return accept.accept(says(next_tokens), torch.tensor(drafted), tree, goes_on(accept))[1]


def tokens_of(accept: Acceptor, row: int = 0) -> list[int]:
    return accept.sequences[row, : accept.rows[row].length].tolist()


def test_a_walk_goes_on_while_a_child_carries_the_models_token():
    accept = acceptor([[1, 2]])
    # Nodes draft 3, then 4 or 5 for its place, 6 or 7 below 4 ... ; the model says 4, 7, 9 along the way.
    assert walk(accept, [[4, 7, 0, 0, 9, 0]], [[3, 4, 5, 6, 7, 8]]) == [[0, 1, 4]]
    assert tokens_of(accept) == [1, 2, 4, 7, 9]
    assert (accept.rows[0].length, accept.rows[0].last) == (5, 9)


def test_a_step_without_an_accepted_draft_adds_the_models_own_token():
    accept = acceptor([[1]])
    assert walk(accept, [[9, 0, 0, 0, 0, 0]], [[3, 4, 5, 6, 7, 8]]) == [[0]]
    assert tokens_of(accept) == [1, 9]


def test_of_equal_siblings_the_first_is_taken():
    """Where the host walks. A draft has no equal siblings."""
    accept = acceptor([[1]], criteria=[EndsAt(-1)])
    assert walk(accept, [[4, 8, 9, 0, 0, 0]], [[3, 4, 4, 6, 7, 8]]) == [[0, 1]]
    assert tokens_of(accept) == [1, 4, 8]


def test_rows_walk_side_by_side_and_finished_ones_stand_still():
    accept = acceptor([[1, 2], [3, 4]], criteria=[EosTokenCriteria(9)])
    drafted = [[5, 6, 7, 8, 1, 2]] * 2
    assert walk(accept, [[9, 0, 0, 0, 0, 0], [6, 8, 0, 3, 0, 0]], drafted) == [[0], [0, 1, 3]]
    assert not accept.finished()
    assert walk(accept, [[4, 0, 0, 0, 0, 0]] * 2, drafted) == [[], [0]]
    assert tokens_of(accept, 0) == [1, 2, 9]
    assert tokens_of(accept, 1) == [3, 4, 6, 8, 3, 4]
    assert accept.padded(pad_token=0).tolist() == [[1, 2, 9, 0, 0, 0], [3, 4, 6, 8, 3, 4]]


def test_the_end_token_and_the_length_end_a_row_inside_a_branch():
    accept = acceptor([[1]], criteria=[EosTokenCriteria(6)])
    assert walk(accept, [[4, 6, 0, 8, 0, 9]], [[3, 4, 5, 6, 7, 8]]) == [[0, 1]]
    assert tokens_of(accept) == [1, 4, 6] and accept.finished()
    accept = acceptor([[1]], criteria=[MaxLengthCriteria(3)])
    assert accept.remaining_tokens() == 2
    assert walk(accept, [[4, 6, 0, 8, 0, 9]], [[3, 4, 5, 6, 7, 8]]) == [[0, 1]]
    assert tokens_of(accept) == [1, 4, 6] and accept.finished() and accept.remaining_tokens() == 0


def test_sequences_grow_without_end():
    accept, root = acceptor([[1]]), fixed([()])
    expected = [place % WORDS for place in range(200)]
    for token in expected:
        walk(accept, [[token]], [[0]], root)
    assert tokens_of(accept) == [1, *expected]


class Seen(LogitsProcessor):
    """Notes the tokens it is shown and forbids 4."""

    def __init__(self):
        self.prefixes = []

    def __call__(self, input_ids, scores):
        self.prefixes.append(input_ids[0].tolist())
        return scores.index_fill(1, torch.tensor([4]), float("-inf"))


def test_processors_are_shown_every_prefix_once_and_decide():
    seen, logits = Seen(), says([[4, 0, 7, 0, 0, 0]])
    logits[0, 0, 5] = 1.0  # the second best at the root
    accept = acceptor([[1, 2]], [seen])
    assert accept.accept(logits, torch.tensor([[3, 4, 5, 6, 7, 8]]), TREE)[1] == [[0, 2]]
    assert seen.prefixes == [[1, 2], [1, 2, 5]]
    assert tokens_of(accept) == [1, 2, 5, 7]


class EndsAt(StoppingCriteria):
    def __init__(self, token):
        self.token, self.prefixes = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.prefixes.append(input_ids[0].tolist())
        return input_ids[:, -1] == self.token


def test_a_custom_criterion_is_asked_behind_every_token():
    criterion = EndsAt(7)
    accept = acceptor([[1]], criteria=[criterion])
    assert walk(accept, [[4, 7, 0, 0, 9, 0]], [[3, 4, 5, 6, 7, 8]]) == [[0, 1]]
    assert criterion.prefixes == [[1, 4], [1, 4, 7]]
    assert accept.finished()


def test_tokens_are_drawn_from_the_distribution_at_their_own_node():
    """Two tokens of equal weight at the root, one behind each: both come up, and each with its own child."""
    torch.manual_seed(0)
    logits = torch.full((1, 3, WORDS), -1e4)
    logits[0, 0, [4, 5]] = 0.0
    logits[0, 1, 8] = logits[0, 2, 9] = 0.0
    tree, drafted = fixed([(), (0,), (1,)]), torch.tensor([[3, 4, 5]])
    drawn = []
    for _ in range(40):
        accept = acceptor([[1]], do_sample=True)
        branches = accept.accept(logits, drafted, tree)[1]
        drawn.append((branches[0], tokens_of(accept)[1:]))
    assert sorted(set(map(str, drawn))) == ["([0, 1], [4, 8])", "([0, 2], [5, 9])"]


def test_scores_and_logits_are_kept_for_every_added_token():
    accept = acceptor([[1], [2]], return_dict_in_generate=True, output_scores=True, output_logits=True)
    walk(accept, [[4, 7, 0, 0, 9, 0], [4, 7, 0, 0, 9, 0]], [[3, 4, 5, 6, 7, 8]] * 2)
    for name in ("scores", "logits"):
        kept = accept.stacked(name)
        assert [step.argmax(-1).tolist() for step in kept] == [[4, 4], [7, 7], [9, 9]]
