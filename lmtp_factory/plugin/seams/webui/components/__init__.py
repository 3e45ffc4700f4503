"""Extensions of `llamafactory.webui.components`, the tabs of LLaMA Board."""
