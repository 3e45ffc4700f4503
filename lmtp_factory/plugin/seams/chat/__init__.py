"""Extensions of `llamafactory.chat`."""
