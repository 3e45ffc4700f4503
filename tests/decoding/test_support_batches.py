"""Batches that are left to stock ``generate``: processors, criteria and scores that need all rows at once."""

import pytest
import torch
import torch.nn.functional as F
from helpers.decoding import GREEDY, assert_as_stock, assert_left_to_stock, decoded, padded, prompt, stock
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.logits_process import TopKLogitsWarper

from lmtp_factory.plugin.chat import ClientDisconnected


@pytest.mark.parametrize(
    "kwargs",
    [
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 2},
        {"prefix_allowed_tokens_fn": lambda row, ids: [20 + row, 30 + row, 40 + len(ids)]},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_processors_that_index_rows_get_the_whole_batch(leap, kwargs, caplog):
    reason = "a logits processor wants the whole batch"
    assert_left_to_stock(leap(), reason, caplog, **padded([9, 5]), max_new_tokens=8, **GREEDY, **kwargs)
    assert_as_stock(leap(), prompt(), max_new_tokens=8, **GREEDY, **kwargs)


class TokenOfTheRow(LogitsProcessor):
    """Wants one token of each row, by the row's number."""

    def __call__(self, input_ids, scores):
        assert len(scores) == 2
        return scores + 1e4 * F.one_hot(torch.tensor([30, 40]) + input_ids.shape[1], scores.shape[1])


class LengthOfTheRow(StoppingCriteria):
    """Ends each row at a length of its own, by the row's number."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([12, 15]) <= input_ids.shape[1]


class FewTokens(TopKLogitsWarper):
    """A subclass may do anything."""

    def __call__(self, input_ids, scores):
        assert len(scores) == 2
        return super().__call__(input_ids, scores)


def nothing(input_ids, scores):
    return scores


@pytest.mark.parametrize(
    "name, argument, made",
    [
        ("TokenOfTheRow", "logits_processor", TokenOfTheRow()),
        ("LengthOfTheRow", "stopping_criteria", LengthOfTheRow()),
        ("FewTokens", "logits_processor", FewTokens(4)),
        ("nothing", "logits_processor", nothing),
    ],
    ids=["processor", "criterion", "subclass", "function"],
)
def test_processors_and_criteria_of_others_get_the_whole_batch(leap, name, argument, made, caplog):
    reason = f"{name} is no class of transformers and may want the whole batch"
    kwargs = {"max_new_tokens": 8, "eos_token_id": 355, argument: [made]} | GREEDY
    output = assert_left_to_stock(leap(), reason, caplog, **padded([9, 5]), **kwargs)
    if name == "TokenOfTheRow":
        assert output[:, 9].tolist() == [39, 49]
    if name == "LengthOfTheRow":
        assert output.shape[1] == 15 and output[0, 12:].tolist() == [0] * 3


def test_custom_processors_of_a_single_row_do_not_fall_back(leap):
    kwargs = {"logits_processor": [nothing], "stopping_criteria": [AtLength()]}
    output, _ = assert_as_stock(leap(), prompt(), max_new_tokens=20, **kwargs, **GREEDY)
    assert output.shape[1] == 15


def test_the_chat_s_own_criterion_does_not_fall_back(leap):
    assert_as_stock(
        leap(), **padded([9, 5]), max_new_tokens=8, eos_token_id=355, stopping_criteria=[ClientDisconnected()], **GREEDY
    )


class AtLength(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 15)


def test_rows_that_end_early_without_a_padding_token_fall_back(leap, caplog):
    reason = "rows of a batch end by a criterion of their own and there is no end-of-sequence token to pad with"
    kwargs = {"stopping_criteria": [AtLength()], "max_new_tokens": 9} | GREEDY
    assert_left_to_stock(leap(), reason, caplog, **padded([9, 5]), **kwargs)
    caplog.clear()
    assert_left_to_stock(leap(), reason, caplog, **padded([9, 5]), max_time=60.0, max_new_tokens=9, **GREEDY)


@pytest.mark.parametrize("name", ["output_scores", "output_logits"])
def test_scores_of_rows_that_end_before_others_fall_back(leap, name, caplog):
    """Stock goes on scoring their padding."""
    model, inputs, kwargs = leap(), padded([9, 5]), {name: True, "return_dict_in_generate": True} | GREEDY
    end = int(stock(model, **inputs, max_new_tokens=9, **GREEDY)[0, 13])
    reason = "scores are wanted of rows that may end before others"
    assert_left_to_stock(model, reason, caplog, **inputs, max_new_tokens=9, eos_token_id=end, **kwargs)
    decoded(model, **inputs, max_new_tokens=9, **kwargs)  # all rows have nine
    decoded(model, prompt(), max_new_tokens=9, eos_token_id=end, **kwargs)
