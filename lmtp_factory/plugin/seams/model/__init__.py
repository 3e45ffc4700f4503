"""Extensions of `llamafactory.model`."""
