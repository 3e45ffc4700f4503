"""What ends in lmtp/tree.json: costs of a device, replay of the model's own text, choice of the tree."""
