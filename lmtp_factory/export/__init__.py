"""Files written beside an exported model."""
