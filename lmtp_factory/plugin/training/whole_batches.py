"""Evaluation on several ranks counts each document once."""

from datasets import Dataset, concatenate_datasets

from ...modeling.losses.targets import IGNORE_INDEX


def pad_with_unlabelled(documents: Dataset, multiple: int) -> Dataset:
    """Append documents without labels until their number is a multiple of `multiple`.

    accelerate fills the last batches of the ranks with the first documents, whose losses and hits would count twice.

    Args:
        documents: Tokenised documents with the column `labels`.
        multiple: Number of documents that all ranks read at once.
    """
    missing = -len(documents) % multiple
    if not missing:
        return documents
    rows = (documents[i % len(documents)] for i in range(missing))
    unlabelled = [row | {"labels": [IGNORE_INDEX] * len(row["labels"])} for row in rows]
    return concatenate_datasets([documents, Dataset.from_list(unlabelled, features=documents.features)])
