"""Extensions of `llamafactory.data`."""
