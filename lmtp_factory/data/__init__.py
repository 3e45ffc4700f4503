"""Training data: dataset names, packing of documents, and hidden states on disk."""
