"""`generate` of a model with leap heads."""

from collections.abc import Callable

import torch
from transformers import CompileConfig

from .loop import decode
from .request import DecodeRequest, requested
from .stats import DecodeStats
from .tree_config import TreeConfig, tree_config_for


class LookBackDecoding:
    """Mixin in front of a `*ForCausalLM` class with leap heads; see `attach_heads`.

    Attributes:
        decode_strategy: what `generate` does where its caller does not say, one of `options.STRATEGIES`.
    """

    decode_strategy: str = "auto"
    _compiled_backbone: tuple | None = None

    def generate(
        self,
        *args,
        lmtp_decode: str | None = None,
        lmtp_tree: TreeConfig | None = None,
        lmtp_stats: DecodeStats | None = None,
        **kwargs,
    ):
        """Same output as `GenerationMixin.generate`, in fewer forwards where the heads can help.

        Args:
            lmtp_decode: `auto` or `backward` (look-back), `forward` (the paper's F-MTP), `off` (stock); default the
                model's `decode_strategy`.
            lmtp_tree: the tree to draft with; default `tree_config`.
            lmtp_stats: filled in with what was done.

        Raises:
            LMTPError: an unknown `lmtp_decode`; a tree that this vocabulary does not allow.
        """
        strategy = self.decode_strategy if lmtp_decode is None else lmtp_decode
        request = DecodeRequest(strategy, lmtp_tree, DecodeStats() if lmtp_stats is None else lmtp_stats)
        with requested(request, kwargs.get("streamer")):
            return super().generate(*args, **kwargs)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        """The one method of `generate` that look-back decoding replaces."""
        prepared = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
        output = decode(self, *prepared, model_kwargs)
        return super()._sample(*prepared, **model_kwargs) if output is None else output

    def tree_config(self) -> TreeConfig:
        """The tree that `generate` drafts with: `lmtp/tree.json`'s or the device's default."""
        return tree_config_for(self)

    def compiled_backbone(self, options: CompileConfig | None) -> Callable:
        """The backbone's forward under `torch.compile`, kept for the next call with the same options."""
        options = options or CompileConfig()
        if self._compiled_backbone is None or self._compiled_backbone[0] != options:
            self._compiled_backbone = options, torch.compile(self.base_model.__call__, **options.to_dict())
        return self._compiled_backbone[1]

    def __getstate__(self) -> dict:
        """For pickle and copy: a compiled backbone cannot be pickled, and a copy's would be the original's."""
        return {name: value for name, value in super().__getstate__().items() if name != "_compiled_backbone"}
