"""Self-distillation: a model answers prompts, and its answers become the data that its leap heads learn from.

`pipeline` -> `prompts` or `self_prompts` (what to ask), `chat` (the tokens that the model reads), an engine
(`hf_engine`, `server_engine`), `journal` (rows as they come), `filters`, `dataset` (what training reads).
"""
