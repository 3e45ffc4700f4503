"""Look-back decoding: the same output as `generate` in fewer forwards. Depends on torch and transformers only.

    draft -> verify -> accept -> advance         (see loop.py)

Glossary:

root      the newest token of a row; already generated, not yet in the key-value cache
depth     distance in tokens from the last hidden state; the root has depth 1
level     distance in tokens from the root: depth - 1
node      a token of the draft tree; node 0 is the root
branch    the nodes on the path from the root to one node
column    a position along the sequence axis of the key-value cache; a row owns the columns below its length
window    the last hidden states of each row, from which the heads draft
tau       average number of tokens per forward, not counting the prefill
"""

from .attach import attach_heads, load_model
from .mixin import LookBackDecoding
from .stats import DecodeStats
from .tree_config import TreeConfig


__all__ = ["DecodeStats", "LookBackDecoding", "TreeConfig", "attach_heads", "load_model"]
