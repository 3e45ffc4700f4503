"""Extensions of LLaMA-Factory: each file extends the upstream module of the same path with `extend(module)`."""
