"""Which logits processors and stopping criteria may be asked row by row."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
)
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.logits_process import (
    AlternatingCodebooksLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria

from lmtp_factory.decoding import row_safety


ROW_SAFE = [
    TemperatureLogitsWarper(0.7),
    RepetitionPenaltyLogitsProcessor(1.4),
    TopPLogitsWarper(0.8),
    TopKLogitsWarper(5),
    TopHLogitsWarper(0.5),
    MinPLogitsWarper(0.1),
    TypicalLogitsWarper(0.8),
    EpsilonLogitsWarper(0.01),
    EtaLogitsWarper(0.01),
    MinLengthLogitsProcessor(15, 3),
    MinNewTokensLengthLogitsProcessor(9, 5, 3),
    NoRepeatNGramLogitsProcessor(2),
    SequenceBiasLogitsProcessor([[[5, 6], 3.0]]),
    NoBadWordsLogitsProcessor([[5], [8, 9]]),
    ForcedBOSTokenLogitsProcessor(4),
    ForcedEOSTokenLogitsProcessor(16, 3),
    InfNanRemoveLogitsProcessor(),
    ExponentialDecayLengthPenalty((2, 1.5), 3, 9),
    LogitNormalization(),
    SuppressTokensAtBeginLogitsProcessor([7], 9),
    SuppressTokensLogitsProcessor([6]),
    WatermarkLogitsProcessor(40, "cpu"),
    AlternatingCodebooksLogitsProcessor(9, 20, 20),
    MaxLengthCriteria(14),
    MaxTimeCriteria(1e9),
    EosTokenCriteria([3, 7]),
]


# Row-safe by reading: Whisper's looks at each row in a loop, and stop strings want a tokenizer (tested with generate).
ROW_SAFE_BY_READING = {"WhisperTimeStampLogitsProcessor", "BarkEosPrioritizerLogitsProcessor", "StopStringCriteria"}


@pytest.mark.parametrize("part", ROW_SAFE, ids=lambda part: type(part).__name__)
def test_row_safe_processors_and_criteria_give_the_same_row_by_row(part):
    generator = torch.Generator().manual_seed(0)
    for length in (9, 14, 15, 16):
        ids = torch.randint(40, (3, length), generator=generator)
        scores = torch.randn(3, 40, generator=generator)
        whole = part(ids, scores.clone())
        rows = [part(ids[b : b + 1], scores[b : b + 1].clone()) for b in (2, 0, 1)]
        assert torch.equal(torch.cat([rows[1], rows[2], rows[0]]), whole)


def test_every_processor_and_criterion_of_transformers_is_classified():
    """A new one has to be put on one of the lists."""
    defined = set()
    for module, base in ((logits_process, LogitsProcessor), (stopping_criteria, StoppingCriteria)):
        kinds = (kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, base))
        defined |= {kind.__name__ for kind in kinds if kind is not base}
    row_safe = {type(part).__name__ for part in ROW_SAFE} | ROW_SAFE_BY_READING
    whole_batch = row_safety.WHOLE_BATCH_PROCESSORS | row_safety.WHOLE_BATCH_CRITERIA
    assert defined == row_safe | whole_batch and not row_safe & whole_batch
