"""Leap-MTP loss: cross-entropy of every head against its own target (L-MTP, arXiv 2505.17505, equations 4 and 5).

    stage 1:  L = sum_{i>=1} w_i CE_i                          w_i = head_decay ** (i - 1)
    stage 2:  L = CE_0 + head_weight * sum_{i>=1} w_i CE_i

Head ``i`` at position ``s`` is trained on ``labels[s + offsets[i]]`` (:mod:`.targets`); each head is averaged over its own
valid targets. Two implementations give the same numbers; callers choose one, neither falls back to the other:

============= ================================ ===================================================
module        peak memory of the logits        gradients
============= ================================ ===================================================
eager         heads x rows x vocabulary        autograd, in the backward
chunked       one chunk x vocabulary           of each chunk while its logits exist, in the forward
============= ================================ ===================================================

The chunked one turns logits into their gradient in place, in plain torch (:mod:`.softmax`) or in a Triton kernel
(:mod:`.softmax_triton`); :mod:`.path` chooses.
"""
