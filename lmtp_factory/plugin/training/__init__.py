"""Training of the two L-MTP stages: trainer, collators, metrics and cached hidden states."""
