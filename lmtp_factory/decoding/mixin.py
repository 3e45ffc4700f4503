"""`generate` for models with leap heads."""

from . import compat
from .cache import static_cache_reset_on_error
from .compiled import Compiled
from .loop import decode
from .request import DecodeRequest, requested
from .stats import DecodeStats
from .tree_choice import tree_config_for
from .tree_config import TreeConfig


class LookBackDecoding:
    """Mixin that `attach_heads` places before a `*ForCausalLM` class.

    Attributes:
        decode_strategy: Default strategy of `generate`, one of `options.STRATEGIES`.
        compiled_functions: What earlier calls have compiled.
    """

    decode_strategy: str = "auto"
    compiled_functions: Compiled | None = None

    def generate(
        self,
        *args,
        lmtp_decode: str | None = None,
        lmtp_tree: TreeConfig | None = None,
        lmtp_stats: DecodeStats | None = None,
        **kwargs,
    ):
        """Generate the same output as `GenerationMixin.generate`, in fewer forwards if the call is supported.

        Args:
            args: Passed to `GenerationMixin.generate`.
            lmtp_decode: `auto` or `backward` (look-back decoding), `forward` (the paper's F-MTP), or `off`
                (transformers' own decoding). Default `self.decode_strategy`.
            lmtp_tree: Draft tree. Default `self.tree_config()`.
            lmtp_stats: Statistics to update in place.
            kwargs: Passed to `GenerationMixin.generate`.

        Raises:
            LMTPError: `lmtp_decode` is unknown, the tree uses candidate ranks beyond the vocabulary, or
                `lmtp/tree.json` is damaged.
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
        """Decode with the heads, or with transformers' own method if the call is not supported."""
        prepared = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
        with static_cache_reset_on_error(self, model_kwargs.get(compat.CACHE)):
            output = decode(self, *prepared, model_kwargs)
        return super()._sample(*prepared, **model_kwargs) if output is None else output

    def tree_config(self, compiled: bool = False) -> TreeConfig:
        """Return the default draft tree: `lmtp/tree.json` or the device's default.

        Args:
            compiled: Whether the backbone's forward is compiled.

        Raises:
            LMTPError: `lmtp/tree.json` is damaged.
        """
        return tree_config_for(self, compiled)

    def __getstate__(self) -> dict:
        """Omit compiled functions: they cannot be pickled, and a copy would share the original's weights."""
        return {name: value for name, value in super().__getstate__().items() if name != "compiled_functions"}
