"""Extensions of `llamafactory.train`."""
