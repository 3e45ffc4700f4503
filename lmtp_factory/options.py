"""Choices and defaults that YAML keys, Python arguments and documents share. Imports nothing."""

# Of lmtp_decode: `backward` looks back, `forward` is the paper's F-MTP, `off` is stock; `auto` looks back where there are
# heads.
STRATEGIES = ("auto", "backward", "forward", "off")

# Of lmtp_export: a plain model; the same with the heads in lmtp/; with a loader for plain transformers too.
EXPORTS = ("ntp", "heads", "custom_generate")

# Weight of the extra heads' losses beside the next-token loss in stage 2, and of each head beside the one before.
HEAD_WEIGHT = 0.1
HEAD_DECAY = 1.0
