"""Which logits processors and stopping criteria can be called with one row of a batch at a time."""

from collections.abc import Callable

from torch import Tensor


# Classes of transformers that use a row's index in the batch or combine rows, so they need the whole batch.
WHOLE_BATCH_PROCESSORS = {
    "ClassifierFreeGuidanceLogitsProcessor",
    "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "WhisperNoSpeechDetection",
}
WHOLE_BATCH_CRITERIA = {"ConfidenceCriteria"}
# Packages whose other processors and criteria treat rows independently.
_ROW_SAFE_PACKAGES = ("transformers.", "lmtp_factory.")


def wants_whole_batch(part: Callable) -> bool:
    """Return whether a logits processor or stopping criterion of transformers needs all rows at once."""
    # Since transformers 5.24 a repetition penalty holds the padding of every row.
    if isinstance(getattr(part, "prompt_ignore_length", None), Tensor):
        return True
    return is_known(part) and type(part).__name__ in WHOLE_BATCH_PROCESSORS | WHOLE_BATCH_CRITERIA


def is_known(part: Callable) -> bool:
    """Return whether a logits processor or stopping criterion is defined in transformers or in this package."""
    return type(part).__module__.startswith(_ROW_SAFE_PACKAGES)
