"""The demo's model: SmolLM2-135M-Instruct from the package index."""
