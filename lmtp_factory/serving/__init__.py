"""Look-back drafts in engines that others maintain.

`windows` and `chains` know no engine: states in, tokens out. `vllm` binds them to vLLM's V1 model runner.
"""
