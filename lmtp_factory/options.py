"""Choices and defaults shared by YAML keys, Python arguments and the documentation. Imports nothing."""

# Values of lmtp_decode. `backward`: look-back decoding. `forward`: the paper's F-MTP. `off`: transformers' own generate.
# `auto`: `backward` if the model has heads.
STRATEGIES = ("auto", "backward", "forward", "off")

# Values of lmtp_export. `ntp`: a plain model. `heads`: also the heads in lmtp/. `custom_generate`: also a loader for
# transformers without the plugin.
EXPORTS = ("ntp", "heads", "custom_generate")

# Weight of the extra heads' losses relative to the next-token loss in stage 2, and of each head relative to the previous.
HEAD_WEIGHT = 0.1
HEAD_DECAY = 1.0
