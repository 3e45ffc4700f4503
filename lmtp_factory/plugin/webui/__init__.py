"""Components and texts that the extensions of LLaMA Board use."""
