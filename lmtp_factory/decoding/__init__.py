"""Look-back decoding: the same output in fewer forwards. Needs torch and transformers only."""
