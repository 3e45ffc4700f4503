"""Which logits processors and stopping criteria treat every row of a batch by itself: rows are walked one by one here."""

from collections.abc import Callable


# Classes of transformers that know a row by its place in the batch, or mix rows. Each row is shown on its own here.
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
# Packages whose other processors and criteria are known to treat every row by itself.
_ROW_SAFE_PACKAGES = ("transformers.", "lmtp_factory.")


def is_known(part: Callable) -> bool:
    """Whether a logits processor or stopping criterion is defined by transformers or here, not by a subclass elsewhere."""
    return type(part).__module__.startswith(_ROW_SAFE_PACKAGES)
