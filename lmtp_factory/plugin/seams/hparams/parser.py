"""Checks arguments and resolves the source of the heads, between upstream's parsing and its own checks."""

import copy
import functools
from collections.abc import Callable
from types import ModuleType

from ....errors import LMTPError
from ... import hooks, validation
from ...chat import starts_chat
from ...heads_source import resolve_inference, resolve_training
from ...stages import STAGES
from ...versions import PARSER_OF_BACKEND


_BACKENDS = {
    "_parse_train_mca_args": "Megatron (USE_MCA=1)",
    "_parse_train_mbridge_args": "Megatron Bridge (USE_MEGATRON_BRIDGE=1)",
}


def extend(parser: ModuleType) -> None:
    """Wrap upstream's parsers of the arguments of training, inference and every other backend."""
    parse_train = hooks.expect(parser, "_parse_train_args", "args")
    parse_infer = hooks.expect(parser, "_parse_infer_args", "args")
    hooks.expect(parser, "read_args", "args")
    verify_model = hooks.expect(parser, "_verify_model_args", "model_args", "data_args", "finetuning_args")

    @functools.wraps(parse_train)
    def parse_train_args(args=None):
        parsed = parse_train(args)
        model_args, data_args, training_args, finetuning_args, _ = parsed
        validation.check_training_keys(model_args, data_args, training_args, finetuning_args)
        source = resolve_training(model_args, data_args, training_args, finetuning_args)
        validation.check_training(model_args, data_args, training_args, finetuning_args, source)
        finetuning_args.heads_source = source
        if source is not None and source.resumed is not None:  # upstream itself would take an incomplete checkpoint too
            training_args.resume_from_checkpoint = str(source.resumed)
        return parsed

    @functools.wraps(parse_infer)
    def parse_infer_args(args=None):
        parsed = parse_infer(args)
        model_args, data_args, finetuning_args, _ = parsed
        exports = model_args.export_dir is not None and not starts_chat.get()
        validation.check_inference_keys(model_args, finetuning_args, exports)
        source = resolve_inference(model_args, finetuning_args, exports)
        validation.check_inference(model_args, data_args, finetuning_args, source, exports)
        finetuning_args.heads_source = source
        finetuning_args.mtp_type = None  # a stage's YAML serves here too, and nothing is trained
        return parsed

    @functools.wraps(verify_model)
    def verify_model_args(model_args, data_args, finetuning_args):
        """Check as upstream does, but let stage 1 freeze a quantised backbone, which needs no adapters."""
        if finetuning_args.lmtp_stage == 1 and model_args.quantization_bit is not None:
            model_args = copy.copy(model_args)
            model_args.quantization_bit = None
        return verify_model(model_args, data_args, finetuning_args)

    parser._parse_train_args, parser._parse_infer_args = parse_train_args, parse_infer_args
    parser._verify_model_args = verify_model_args
    for name in [name for name in vars(parser) if PARSER_OF_BACKEND.fullmatch(name)]:
        setattr(parser, name, _refusing_stages(hooks.expect(parser, name, "args"), parser.read_args))


def _refusing_stages(parse: Callable, read_args: Callable) -> Callable:
    """Wrap the parser of a backend that would train an L-MTP stage as plain SFT."""
    backend = _BACKENDS.get(parse.__name__, f"the backend of LLaMA-Factory's {parse.__name__}")

    @functools.wraps(parse)
    def parse_and_refuse(args=None):
        written = read_args(args)
        values = list(written.values()) if isinstance(written, dict) else list(written)
        if any(str(value).split("=")[-1] in STAGES.values() for value in values):
            raise LMTPError(
                f"L-MTP stages do not run on {backend}: unset the variable that chooses it and use deepspeed instead."
            )
        return parse(args)

    return parse_and_refuse
