"""Choosing the draft tree in lmtp/tree.json: costs on the device, acceptance on the model's own text, search."""
