"""What training brought: head accuracy, perplexity, plots."""
