"""Extensions of `llamafactory.extras`."""
