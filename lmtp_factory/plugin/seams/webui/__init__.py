"""Extensions of `llamafactory.webui`, LLaMA Board."""
