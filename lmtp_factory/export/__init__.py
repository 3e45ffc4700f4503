"""What goes beside an exported model."""
