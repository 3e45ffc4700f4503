"""The only package that knows LLaMA-Factory. Importing it imports the standard library only."""
