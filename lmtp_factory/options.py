"""Choices and defaults shared by YAML keys, commands, Python arguments and the documentation. Imports nothing."""

# Values of lmtp_decode. `backward`: look-back decoding. `forward`: the paper's F-MTP. `off`: transformers' own
# generate. `auto`: `backward` if the model has heads.
STRATEGIES = ("auto", "backward", "forward", "off")

# Values of lmtp_export. `ntp`: a plain model. `heads`: also the heads in lmtp/. `custom_generate`: also a loader for
# transformers without the plugin.
EXPORTS = ("ntp", "heads", "custom_generate")

# Values of head_kind: an unembedding for each head, or the LM head's for all. The first is the default.
HEAD_KINDS = ("own", "shared")
# Residual blocks in each head.
HEAD_LAYERS = 1
# Values of head_block: the paper's block, or a gated MLP. The first is the default.
HEAD_BLOCKS = ("linear", "mlp")
# Values of head_inputs: the final hidden state (the paper), also the newest known token, or all layers' states. The first is
# the default.
HEAD_INPUTS = ("state", "state_token", "layers")

# Weight of the extra heads' losses relative to the next-token loss in stage 2, and of each head relative to the
# previous.
HEAD_WEIGHT = 0.1
HEAD_DECAY = 1.0

# Of `lmtp-cli distill`: prompts that the model writes, longest prompt and longest answer in tokens.
DISTILL_PROMPTS, DISTILL_PROMPT_TOKENS, DISTILL_ANSWER_TOKENS = 1000, 1024, 512

# Of `lmtp-cli report --marginal`: the largest K, and the number of positions that are scored.
MARGINAL_LARGEST_K, MARGINAL_POSITIONS = 64, 256
