"""Extensions of `llamafactory.hparams`."""
