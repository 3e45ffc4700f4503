"""Extensions of `llamafactory.train.sft`."""
