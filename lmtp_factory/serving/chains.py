"""Greedy drafts for an engine that verifies chains."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..decoding.draft import Window, propose_candidates, unembeddings_kept
from ..modeling.heads import LeapHeads


# Number of logits that a draft computes at once.
LOGITS = 2**25


class DraftModel(nn.Module):
    """What drafts read of a model that an engine runs, under the names of a transformers model.

    Args:
        heads: The leap heads.
        config: Configuration of the model.
        embed: Maps (batch,) token ids to (batch, hidden) embeddings, scaled as the model reads them.
        lm_head: (vocabulary, hidden) weight of the LM head, for heads of kind `shared`.
    """

    def __init__(
        self, heads: LeapHeads, config: PretrainedConfig, embed: Callable[[Tensor], Tensor], lm_head: Tensor | None
    ):
        super().__init__()
        self.leap_heads, self.config, self._embed = heads, config, embed
        self.unembeddings: dict[LeapHeads, list[nn.Module]] = {}  # an engine's weights do not change
        self._lm_head = None
        if lm_head is not None:
            with torch.device("meta"):
                self._lm_head = nn.Linear(lm_head.shape[1], lm_head.shape[0], bias=False)
            self._lm_head.weight = nn.Parameter(lm_head, requires_grad=False)

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        """Return the embedding."""
        return self._embed

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the LM head."""
        return self._lm_head


@torch.inference_mode()
def draft_chains(model: DraftModel, window: Window, length: int) -> list[list[int]]:
    """Draft the most probable token of each level, for some requests at a time: engines leave little memory free.

    Args:
        model: The heads and what they read.
        window: The last states of each request.
        length: Largest number of tokens.

    Returns:
        The tokens of each request. A chain ends before the first level whose state is missing.
    """
    config = model.leap_heads.config
    at_once = max(1, LOGITS // (length * (config.draft_vocab_size or config.vocab_size)))
    parts = [
        Window(
            window.states[first : first + at_once],
            window.filled[first : first + at_once],
            None if window.real is None else window.real[first : first + at_once],
            None if window.roots is None else window.roots[first : first + at_once],
        )
        for first in range(0, len(window.states), at_once)
    ]
    with unembeddings_kept(model.unembeddings):
        candidates = [propose_candidates(model, part, length, width=1) for part in parts]
    tokens = torch.cat([part.tokens[:, :, 0] for part in candidates]).tolist()
    known = torch.cat([part.probabilities[:, :, 0] > 0 for part in candidates]).tolist()
    return [chain[: levels.index(False) if False in levels else None] for chain, levels in zip(tokens, known)]
