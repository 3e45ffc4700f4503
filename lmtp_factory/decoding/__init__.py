"""Look-back decoding: the same output in fewer forwards. Needs torch and transformers only.

    draft -> verify -> accept -> advance         (loop.py, on a page)

Glossary:

root      the newest token of a row; decided, but not yet in the key-value cache
depth     how many tokens ahead of the last hidden state: the root is at depth 1
level     how many tokens ahead of the root: depth - 1
node      a drafted token at its place in the tree; node 0 is the root
branch    nodes from the root down to one node
column    a place in the key-value cache; a row owns the columns below its length
window    the last hidden states of each row, which the heads draft from
tau       tokens that a forward brings on average, the prefill not counted
"""

from .attach import attach_heads, load_model
from .mixin import LookBackDecoding
from .stats import DecodeStats
from .tree_config import TreeConfig


__all__ = ["DecodeStats", "LookBackDecoding", "TreeConfig", "attach_heads", "load_model"]
