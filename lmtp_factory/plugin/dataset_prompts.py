"""Prompts of the datasets that LLaMA-Factory can read, for `lmtp-cli distill --dataset`."""

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from ..distill.prompts import MalformedPrompt, Prompt, build_prompt
from ..distill.rows import is_self_distilled
from ..errors import LMTPError, first_line
from .dataset_names import find_datasets


def prompts_from_dataset(names: Sequence[str], dataset_dir: str) -> tuple[list[Prompt], int]:
    """Prompts of datasets in alpaca, sharegpt or openai format, without the answers.

    Args:
        names: Names in dataset_info.json.
        dataset_dir: Directory of dataset_info.json.

    Returns:
        The prompts, and the number of rows left out because they have tools, media or no user text.

    Raises:
        LMTPError: LLaMA-Factory cannot find or read a dataset.
    """
    from datasets.exceptions import DatasetsError
    from llamafactory.data import loader, parser
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import TrainingArguments

    prompts: list[Prompt] = []
    skipped = 0
    # Upstream's loader needs these objects. Nothing is written to output_dir.
    model_args = ModelArguments(model_name_or_path="unused")
    data_args = DataArguments(dataset=",".join(names), dataset_dir=dataset_dir)
    with tempfile.TemporaryDirectory() as unused:
        training_args = TrainingArguments(output_dir=unused, report_to="none", use_cpu=True)
        try:
            for attr in find_datasets(names, dataset_dir, parser.get_dataset_list):
                if is_self_distilled(attr):  # the columns hold ids; these hold the text
                    attr.prompt, attr.response = "instruction", "output"
                if attr.formatting == "openai":
                    # Upstream's openai converter adds Nemotron's system text to every row. The sharegpt converter
                    # reads the same role and content tags and adds none.
                    attr.formatting = "sharegpt"
                for row in loader._load_single_dataset(attr, model_args, data_args, training_args):
                    prompt = _prompt(row)
                    if prompt is None:
                        skipped += 1
                    else:
                        prompts.append(prompt)
        except LMTPError:
            raise
        except (ValueError, KeyError, OSError, DatasetsError) as error:
            reason = f"no column {error}" if isinstance(error, KeyError) else first_line(error)
            raise LMTPError(
                f"Dataset {', '.join(names)} cannot be read from {dataset_dir} ({reason}): correct --dataset, or the "
                "entry in dataset_info.json."
            ) from error
    return prompts, skipped


def _prompt(row: Mapping[str, Any]) -> Prompt | None:
    """The prompt of a row that LLaMA-Factory has converted; None if the prompt is not text alone."""
    if row["_tools"] or row["_images"] or row["_videos"] or row["_audios"]:
        return None
    try:
        return build_prompt(row["_prompt"], row["_system"])
    except MalformedPrompt:
        return None
