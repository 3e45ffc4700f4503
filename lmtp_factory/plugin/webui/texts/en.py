"""English."""

LABELS = {
    "lmtp_panel": {"label": "L-MTP configurations"},
    "lmtp_about": {
        "value": "L-MTP adds heads that predict tokens further ahead. The warm-up trains the heads alone, with the model "
        "frozen; full tuning then trains model and heads together. Empty fields take the default that they "
        "show, or in full tuning the value of the warmed-up heads."
    },
    "num_heads": {"label": "Extra heads", "info": "Number of heads beside the LM head."},
    "leap_stride": {"label": "Leap", "info": "Tokens between two heads; 1 is ordinary multi-token prediction."},
    "leap_offsets": {"label": "Offsets", "info": "Rising offsets instead of heads and leap, e.g. 2,3,6."},
    "lmtp_reach": {"label": "Tokens predicted", "info": "Offset of each head, the LM head first."},
    "head_kind": {
        "label": "Head kind",
        "info": "own: an unembedding for each head; shared: the LM head's, with far fewer parameters.",
    },
    "head_layers": {"label": "Head layers", "info": "Residual blocks in each head."},
    "head_block": {"label": "Head block", "info": "linear: the paper's; mlp: a gated MLP, 4 times as wide."},
    "draft_vocab_size": {
        "label": "Draft vocabulary",
        "info": "Number of tokens that heads can draft, the most frequent of the answers. Empty: all.",
    },
    "head_inputs": {
        "label": "Heads read",
        "info": "state: the final hidden state; state_token: also the newest known token; layers: the states of all layers.",
    },
    "head_backs": {
        "label": "Positions looked back",
        "info": "Only with state_token and many heads: the largest leap that lmtp-cli select may choose.",
    },
    "head_decay": {"label": "Head decay", "info": "Weight of each head's loss relative to the previous head's."},
    "warmup_ratio": {
        "label": "Warmup ratio",
        "info": "Share of the steps used for warmup if warmup steps is 0.",
    },
    "hidden_cache_dir": {
        "label": "Hidden state cache",
        "info": "Optional folder: the frozen model's states are computed once and read in every later epoch.",
    },
    "stage1_pretrained_path": {
        "label": "Warmed-up heads",
        "info": "Finished warm-up of the chosen model. Empty: fresh heads, which disturb the model.",
    },
    "head_weight": {"label": "Head weight", "info": "Weight of the heads' losses beside the next-token loss."},
    "head_learning_rate": {
        "label": "Head learning rate",
        "info": "Learning rate of the heads; the model keeps the other one. Empty: the same.",
    },
    "train_lm_head": {"label": "Train LM head", "info": "Tune the LM head too (with LoRA)."},
    "lmtp_export": {
        "label": "Leap heads",
        "info": "ntp: a plain model without them; heads: the same model plus its heads, which L-MTP decodes faster; "
        "custom_generate: also a loader for plain transformers.",
    },
    "lmtp_decode": {
        "label": "Decoding",
        "info": "For models with leap heads. auto: look-back; backward: look-back; forward: F-MTP; off: stock.",
    },
}

ALERTS = {
    "lmtp_answer": "{tokens} tokens, {speed} tokens/s, tau {tau} (tokens a forward, {strategy})",
    "lmtp_drafted": "show accepted drafts",
    "lmtp_refused": "L-MTP cannot run like this:",
}
