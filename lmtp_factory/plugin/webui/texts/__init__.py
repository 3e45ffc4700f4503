"""What the Board says, a file a language: component (or alert) to its label, explanation or text."""
