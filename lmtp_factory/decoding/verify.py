"""One forward over a whole tree: every node sees the row's past and its own ancestors, nothing else."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..modeling.heads import unembed
from ..modeling.lmtp import softcap_of
from .cache import TreeCache
from .tree import Tree, fixed


# Attention implementations that take a mask of any shape.
MASKED_ATTENTION = ("sdpa", "eager")
# How far logits over a tree may be from those over a branch, as a part of their spread: bf16 noise stays far below,
# wrong masks and heads go far beyond.
_TOLERANCE = 0.1


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """(..., hidden) final hidden states -> (..., vocabulary), the LM head's."""
    return unembed(hidden, model.get_output_embeddings(), softcap_of(model))


def takes_trees(model: nn.Module) -> bool:
    """Whether a forward over a tree gives what forwards over its branches give.

    Some models build their masks by themselves, or have more between the last hidden state and the logits than a matrix.
    The answer is kept for each attention implementation; not in train mode, where dropout may be what differs, and not
    where the trial failed with an error, which may be the device's.
    """
    attention = model.config.get_text_config()._attn_implementation
    answers = vars(model).get("_takes_trees", {})
    if attention in answers and not model.training:
        return answers[attention]
    try:
        with _own_random_numbers(model) if model.training else nullcontext():
            agrees = _agrees_on_a_tree(model)
    except Exception:  # a model may dislike a mask in any way
        return False
    if not model.training:
        model._takes_trees = {**answers, attention: agrees}
    return agrees


def _own_random_numbers(model: nn.Module) -> AbstractContextManager:
    """What dropout draws inside is not missing outside."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return torch.random.fork_rng(devices=devices)


def _agrees_on_a_tree(model: nn.Module) -> bool:
    config = model.config.get_text_config()
    ids = (config.vocab_size // 3 + torch.arange(7, device=model.device)) % config.vocab_size
    prompt, tokens = ids[None, :3], ids[None, 3:]
    cache = TreeCache.replacing(DynamicCache(config=config), config, columns=0)
    positions = torch.arange(3, device=model.device)[None]
    model.base_model(input_ids=prompt, position_ids=positions, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.settle(3, 3)
    tree = fixed([(), (0,), (1,), (1, 0)], model.device)
    columns = torch.full((1, 1), 3, device=model.device)
    hidden = Verifier(model, cache, 0, None, last_position=9)(tokens, tree, [3], columns)
    for leaf, branch in ((1, [0, 1]), (3, [0, 2, 3])):
        path = torch.cat([prompt, tokens[:, branch]], dim=1)
        theirs = model(input_ids=path, use_cache=False).logits[0, -1].float()
        ours = logits_of(model, hidden[0, leaf]).float()
        if not (ours - theirs).norm() <= _TOLERANCE * (theirs - theirs.mean()).norm():
            return False
    return True


def tree_masks(
    config,
    cache: TreeCache,
    tree: Tree,
    lengths: Sequence[int],
    columns: Tensor,
    prompt_mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | dict[str, Tensor | None] | None:
    """Attention masks of a tree in the form that the model's forward takes.

    Args:
        config: the text model's; layers of several kinds take a mask for each kind.
        lengths: columns that each row owns; the tree's nodes come behind the greatest of them.
        columns: (batch, 1) the same on the device, where the masks are made.
        prompt_mask: (batch, prompt) bool, False where a row is padded; None where none is.
        dtype: of additive masks, for eager attention.

    Returns:
        (batch, 1, nodes, columns), bool for sdpa; None where the one node may see everything.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        return _mask(config, cache, 0, window, tree, lengths, columns, prompt_mask, dtype)
    return {
        kind: _mask(
            config, cache, kinds.index(kind), window if kind == "sliding_attention" else None,
            tree, lengths, columns, prompt_mask, dtype,
        )
        for kind in set(kinds)
    }  # fmt: skip


def _mask(config, cache, layer, window, tree, lengths, own, prompt_mask, dtype) -> Tensor | None:
    nodes = tree.nodes
    count, first = cache.layers[layer].get_mask_sizes(nodes)
    in_sight = window is None or count <= window  # a user's cache may keep more than the window
    if nodes == 1 and len(lengths) == 1 and prompt_mask is None and in_sight and not cache.is_fixed:
        return None
    columns = torch.arange(first, first + count, device=own.device)
    past = columns < own
    if prompt_mask is not None:
        real = prompt_mask[:, first : first + count]
        past[:, : real.shape[1]] &= real
    allowed = past[:, None, :].repeat(1, nodes, 1)
    if window is not None:
        allowed &= columns > (own + tree.levels - window)[:, :, None]
    start = max(lengths) - first
    allowed[:, :, start : start + nodes] = tree.ancestors(window)
    allowed = allowed[:, None]
    if config._attn_implementation == "eager":
        mask = torch.zeros(allowed.shape, dtype=dtype, device=own.device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)
    return allowed


class Verifier:
    """The backbone's forward on one generation's trees.

    Args:
        shift: (..., batch, 1) what to add to a row's columns for the position of its next root, in the form that the model
            counts positions in; padding and a user's positions make it differ from 0.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: TreeCache,
        shift: Tensor | int,
        prompt_mask: Tensor | None,
        last_position: int,
        forward: Callable | None = None,
    ):
        self.model, self.cache, self.shift = model, cache, shift
        self.prompt_mask, self.last_position = prompt_mask, last_position
        self.compiled = forward is not None
        self.forward = forward or model.base_model

    def __call__(self, tokens: Tensor, tree: Tree, lengths: Sequence[int], columns: Tensor) -> Tensor:
        """(batch, nodes) token ids -> (batch, nodes, hidden) final hidden states; keys and values go to the cache.

        Args:
            lengths: columns that each row owns.
            columns: (batch, 1) the same on the device.
        """
        config = self.model.config.get_text_config()
        masks = tree_masks(config, self.cache, tree, lengths, columns, self.prompt_mask, self.model.dtype)
        # Nodes past the last position that generation may reach are never accepted; a table of learned positions may
        # end there.
        positions = (self.shift + columns + tree.levels).clamp(max=self.last_position)
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        outputs = self.forward(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=masks,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden = outputs.last_hidden_state
        return hidden.clone() if self.compiled else hidden  # CUDA graphs overwrite their outputs
