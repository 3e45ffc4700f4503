"""The draft vocabulary of fresh heads, counted on the answers of the training set (`draft_vocab_size`)."""

from collections.abc import Iterator

from torch.utils.data import IterableDataset

from ...config import LMTPConfig
from ...errors import LMTPError
from ...modeling.draft_vocabulary import most_frequent
from .. import log


def count_draft_tokens(dataset_module: dict, config: LMTPConfig, vocab_size: int) -> tuple[int, ...]:
    """The most frequent tokens of the answers of the training set.

    Args:
        dataset_module: What upstream's `get_dataset` returns.
        config: Configuration of the heads, with `draft_vocab_size`.
        vocab_size: Number of tokens of the model.

    Returns:
        Increasing token ids.

    Raises:
        LMTPError: There is no training set, or it is a stream.
    """
    dataset = dataset_module.get("train_dataset")
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "column_names"):
        what = "there is none" if dataset is None else "a stream cannot be read beforehand"
        raise LMTPError(
            f"draft_vocab_size counts the tokens of the training set, but {what}: leave it out, or name heads that have a "
            "draft vocabulary in stage1_pretrained_path."
        )
    size, total, covered = config.draft_vocab_size, 0, 0
    tokens = most_frequent(_labels(dataset), size, vocab_size)
    chosen = set(tokens)
    for row in _labels(dataset):
        total += len(row)
        covered += sum(token in chosen for token in row)
    log.info(f"The heads draft {size} of {vocab_size} tokens, {covered / max(total, 1):.1%} of the training answers.")
    return tuple(tokens)


def _labels(dataset) -> Iterator[list[int]]:
    for labels in dataset["labels"]:
        yield [token for token in labels if token >= 0]
