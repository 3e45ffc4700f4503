"""Everything that knows LLaMA-Factory. Importing this package imports nothing but the standard library."""
