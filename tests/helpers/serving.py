"""Stand-ins of an engine."""

import torch
from torch import nn


class Target(nn.Module):
    """A model as vLLM shows it.

    Args:
        model: The transformers model.
        normalises: Whether states are normalised on the way to the LM head.
        softcap: Soft cap of the logits.
    """

    def __init__(self, model, normalises=False, softcap=None):
        super().__init__()
        self.embeddings, self.lm_head = model.get_input_embeddings(), model.get_output_embeddings()
        self.normalises, self.softcap = normalises, softcap

    def embed_input_ids(self, ids):
        return self.embeddings(ids)

    def compute_logits(self, states):
        states = nn.functional.rms_norm(states, states.shape[-1:]) if self.normalises else states
        logits = self.lm_head(states)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
