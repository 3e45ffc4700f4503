"""The checkpoint that training resumes from: complete, saved by the same stage, with heads of the same meaning."""

import inspect
import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ..config import LMTPConfig
from ..errors import LMTPError
from ..files import HEADS_CHECKPOINT, HEADS_FOLDER, STAGE_FILE, atomic_write
from ..modeling.checkpoint import read_config, validate_checkpoint
from . import log
from .stages import STAGES


# Facts about the base model. They are not compared where one of them is None.
BASE_FACTS = ("hidden_size", "vocab_size", "base_layers", "tokenizer_fingerprint")
_NO_HEADS = f"it has no {HEADS_FOLDER}/ folder"
# All facts of a configuration, taken from its signature so that later additions are compared too.
_FACTS = [
    key
    for key in inspect.signature(LMTPConfig).parameters
    if key not in ("num_heads", "stride", "base_model", "kwargs")
]


def choose_checkpoint(training_args) -> Path | None:
    """The checkpoint to resume from; None if training starts at the first step.

    `resume_from_checkpoint` names it. Otherwise it is the newest one in `output_dir` that is complete: a run that is killed
    while it saves leaves an incomplete one behind.

    Raises:
        LMTPError: The named checkpoint does not exist or is incomplete, or all checkpoints in `output_dir` are.
    """
    named, output_dir = training_args.resume_from_checkpoint, Path(training_args.output_dir)
    if not training_args.do_train or named is False or (named is None and training_args.overwrite_output_dir):
        return None
    if named not in (None, True):
        return _named_checkpoint(Path(named))
    found = _checkpoints(output_dir)
    if not found:
        if named:
            raise LMTPError(
                f"resume_from_checkpoint: true finds no checkpoint in output_dir {output_dir}: leave it out."
            )
        return None
    complete, broken = _newest_complete(found)
    if complete is None:
        names, reason = ", ".join(checkpoint.name for checkpoint in found), next(iter(broken.values()))
        if reason == _NO_HEADS:
            raise LMTPError(
                f"output_dir {output_dir} holds checkpoints of another training, which has no leap heads ({names}): write "
                "another output_dir."
            )
        raise LMTPError(
            f"No checkpoint in output_dir {output_dir} was saved whole ({found[0].name}: {reason}): delete {names} to train "
            "from the beginning."
        )
    for checkpoint, reason in broken.items():
        log.warning(f"{checkpoint} was not saved whole ({reason}): training resumes from {complete.name}.")
    if named is None:
        log.info(f"Training resumes from {complete}; overwrite_output_dir: true trains from the beginning.")
    return complete


def _named_checkpoint(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise LMTPError(
            f"resume_from_checkpoint {checkpoint} is no directory: name a {PREFIX_CHECKPOINT_DIR}-N directory, or leave the "
            "key out to resume from the newest one in output_dir."
        )
    reason = _damage(checkpoint)
    if reason is None:
        return checkpoint
    complete, _ = _newest_complete(_checkpoints(checkpoint.parent))
    if complete is not None:
        instead = f"write resume_from_checkpoint: {complete}"
    elif reason == _NO_HEADS:
        raise LMTPError(
            f"resume_from_checkpoint {checkpoint} belongs to another training, which has no leap heads: "
            f"{_begin_elsewhere(named=True)}."
        )
    else:
        instead = "leave the key out and delete it"
    raise LMTPError(f"resume_from_checkpoint {checkpoint} was not saved whole ({reason}): {instead}.")


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories in `folder`, newest first."""
    steps = {
        path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    }
    return sorted(
        (path for path, step in steps.items() if step.isdecimal() and path.is_dir()),
        key=lambda path: int(steps[path]),
        reverse=True,
    )


def _newest_complete(checkpoints: Iterable[Path]) -> tuple[Path | None, dict[Path, str]]:
    """The first complete checkpoint, and the damage of each checkpoint before it."""
    broken = {}
    for checkpoint in checkpoints:
        reason = _damage(checkpoint)
        if reason is None:
            return checkpoint, broken
        broken[checkpoint] = reason
    return None, broken


def _damage(checkpoint: Path) -> str | None:
    """What is missing or unreadable in a checkpoint; None if it is complete.

    The Trainer writes its state last: if the state exists, everything else has been written.
    """
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}"
    except ValueError:
        return f"its {TRAINER_STATE_NAME} is damaged"
    if not (checkpoint / HEADS_FOLDER).is_dir():
        return _NO_HEADS
    try:
        _record(checkpoint)
    except ValueError:
        return f"its {STAGE_FILE} is damaged"
    try:
        validate_checkpoint(checkpoint / HEADS_FOLDER)
    except LMTPError:
        return f"its {HEADS_FOLDER}/ folder cannot be read"
    for weights in checkpoint.glob("*.safetensors"):
        try:
            with safe_open(weights, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"its {weights.name} cannot be read"
    return None


def check_checkpoint(checkpoint: Path, stage: int, config: LMTPConfig, heads: Path | None, named: bool) -> None:
    """Refuse a checkpoint of the other stage or of other heads.

    Args:
        checkpoint: A complete checkpoint.
        stage: Stage of this run.
        config: Configuration of this run's heads. `BASE_FACTS` that are None are not compared.
        heads: Folder that this run's heads start from; None for fresh heads.
        named: Whether `resume_from_checkpoint` names the checkpoint; otherwise it is in `output_dir`.

    Raises:
        LMTPError: The other stage saved it, or its heads differ; the message names both sides.
    """
    instead, saved_by = _begin_elsewhere(named), _stage_of(checkpoint)
    if saved_by != stage:
        start = f", and stage1_pretrained_path: {checkpoint} to start from its heads" if stage == 2 else ""
        raise LMTPError(
            f"Stage {saved_by} saved {checkpoint}, from which stage {stage} would resume: {instead}{start}."
        )
    theirs = read_config(checkpoint / HEADS_FOLDER)
    differing = differences(config, theirs)
    if not differing:
        return
    if heads is not None:
        this_run, same = f"this run, which starts from {heads}", "start from the heads that it began with"
    else:
        this_run, same = "this run", f"write {_in_yaml(theirs, differing)}"
    raise LMTPError(
        f"Training would resume from {checkpoint}, whose heads are not those of {this_run} "
        f"({in_words(differing)}): {same} to go on, or {instead} to train from the beginning."
    )


def differences(ours: LMTPConfig, theirs: LMTPConfig) -> dict[str, tuple]:
    """Facts in which two configurations differ, each with this run's and the checkpoint's value."""
    both = {fact: (getattr(ours, fact), getattr(theirs, fact)) for fact in _FACTS}
    return {
        fact: pair for fact, pair in both.items() if pair[0] != pair[1] and not (fact in BASE_FACTS and None in pair)
    }


def in_words(differing: dict[str, tuple]) -> str:
    """Differences as part of a sentence."""
    return ", ".join(
        f"{_key(fact)} {_value(fact, theirs)} there and {_value(fact, ours)} here"
        for fact, (ours, theirs) in differing.items()
    )


def _in_yaml(theirs: LMTPConfig, differing: dict[str, tuple]) -> str:
    """YAML keys that give this run the checkpoint's heads."""
    left_out = [_key(fact) for fact, (_, value) in differing.items() if value is None and fact not in BASE_FACTS]
    keys = {
        _key(fact): _value(fact, value)
        for fact, (_, value) in differing.items()
        if fact not in BASE_FACTS and value is not None
    }
    if any(fact in BASE_FACTS for fact in differing):
        keys["model_name_or_path"] = theirs.base_model
    instead = " (no num_heads or leap_stride)" if "offsets" in differing else ""
    written = [f"{key}: {value}" for key, value in keys.items()] + [f"no {key}" for key in left_out]
    return " and ".join(written) + instead


def _key(fact: str) -> str:
    return "leap_offsets" if fact == "offsets" else fact


def _value(fact: str, value) -> str:
    return ",".join(map(str, value[1:])) if fact == "offsets" else str(value)


def check_head_learning_rate(checkpoint: Path, rate: float | None, named: bool) -> None:
    """Refuse a checkpoint whose heads train with another `head_learning_rate`: the optimizer's state would bring its own.

    Args:
        checkpoint: A complete checkpoint.
        rate: The key's value in this run.
        named: See `check_checkpoint`.

    Raises:
        LMTPError: The rates differ.
    """
    theirs = _record(checkpoint).get("head_learning_rate")
    if theirs != rate:
        same = "leave head_learning_rate out" if theirs is None else f"write head_learning_rate: {theirs}"
        raise LMTPError(
            f"Training would resume from {checkpoint}, whose optimizer has "
            f"{'no' if theirs is None else 'another'} learning rate for the heads: {same} to go on, or "
            f"{_begin_elsewhere(named)} to train from the beginning."
        )


def _begin_elsewhere(named: bool) -> str:
    """Advice that leaves a checkpoint alone; `named` as in `check_checkpoint`."""
    return f"{'leave resume_from_checkpoint out and ' if named else ''}write another output_dir"


def write_stage(checkpoint: Path, stage: int, head_learning_rate: float | None = None) -> None:
    """Record the stage that saves a checkpoint, and the heads' own learning rate if they have one.

    Raises:
        OSError: The file cannot be written.
    """
    record = {"stage": stage} | ({} if head_learning_rate is None else {"head_learning_rate": head_learning_rate})
    with atomic_write(checkpoint / STAGE_FILE) as file:
        json.dump(record, file)


def _record(checkpoint: Path) -> dict:
    """What was recorded with a checkpoint; empty if there is no record.

    Raises:
        ValueError: The record cannot be read.
    """
    try:
        found = json.loads((checkpoint / STAGE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict) or found.get("stage") not in tuple(STAGES):
        raise ValueError(f"{STAGE_FILE} holds {found!r}")
    return found


def _stage_of(checkpoint: Path) -> int:
    """The stage that saved a complete checkpoint.

    Without a record the files tell. Stage 2 saves an adapter or a model beside the heads. Under DeepSpeed its weights may be
    in DeepSpeed's files alone; the model's configuration is there then too. Stage 1 saves neither.
    """
    from llamafactory.extras.constants import CHECKPOINT_NAMES

    of_stage_2 = {*CHECKPOINT_NAMES, CONFIG_NAME} - {HEADS_CHECKPOINT}
    return _record(checkpoint).get("stage") or (2 if any((checkpoint / name).is_file() for name in of_stage_2) else 1)
