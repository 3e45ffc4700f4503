"""Stage 1 with hidden states from disk (`hidden_cache_dir`): the backbone runs once for all epochs."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import TrainerCallback

from ...errors import LMTPError
from ...modeling.checkpoint import state_size
from ...modeling.model_facts import model_facts
from ...modeling.packing_probe import keeps_documents_apart
from .. import log
from ..heads_source import BaseModel
from .collator import CACHE_INDEX, MEDIA
from .hidden_cache import HiddenCache
from .packing import arrange, pack, places
from .shard_layout import DTYPE, SHARD_BYTES, ShardLayout, documents_digest


# Small caches have this many shards too, so that every rank computes some.
_SHARDS, _LEAST_SHARD = 64, 8 * 2**20
# Number of documents of an earlier run's cache that are compared with the model.
_PROBES = 3


class CachedDocuments(Dataset):
    """Training documents with their index in the cache. Only the collator reads hidden states."""

    def __init__(self, documents, cache: HiddenCache):
        self.documents, self.cache = documents, cache

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict:
        return self.documents[index] | {CACHE_INDEX: index}


def with_cached_states(documents, base: BaseModel, model_args, data_args, folder: str) -> CachedDocuments:
    """The training set with a cache, which is opened before the model loads and filled by `FillCache`.

    Args:
        documents: Upstream's training set.
        base: The backbone.
        folder: Directory of the cache.

    Raises:
        LMTPError: The documents have media, or `HiddenCache.open` refuses the folder.
    """
    if any(any(documents[key]) for key in MEDIA if key in documents.column_names):
        raise LMTPError("hidden_cache_dir is for text alone, and the data has images, videos or audio: leave it out.")
    config, ids = base.config(), documents["input_ids"]
    hidden_size, lengths = state_size(config.get_text_config()), [len(document) for document in ids]
    total = sum(lengths) * hidden_size * DTYPE.itemsize
    layout = ShardLayout(lengths, hidden_size, min(max(total // _SHARDS, _LEAST_SHARD), SHARD_BYTES))
    # Facts of rank 0: another node may have a copy of the model with other file times.
    (weights,) = broadcast_object_list([model_facts(base.path, config)])
    facts = {
        "model": base.path,
        **weights,
        "compute dtype": str(model_args.compute_dtype).removeprefix("torch."),
        "documents": documents_digest(ids),
    }
    if model_args.rope_scaling is not None:
        facts["rope scaling"] = f"{model_args.rope_scaling} for cutoff_len {data_args.cutoff_len}"
    if model_args.quantization_bit is not None:
        double = ", quantised twice" if model_args.double_quantization else ""
        method, kind = model_args.quantization_method, model_args.quantization_type
        facts["quantization"] = f"{method}, {model_args.quantization_bit} bits, {kind}{double}"
    cache = HiddenCache.open(folder, layout, facts)
    missing = len(cache.missing())
    log.info(f"Final hidden states in {folder}: {layout.describe()}, {missing} of them still to be computed.")
    return CachedDocuments(documents, cache)


class FillCache(TrainerCallback):
    """Computes missing shards when training begins; only then can every parallel backbone run.

    A few documents of the other shards are computed again, and states of other weights are refused.
    """

    def __init__(self, trainer, documents: CachedDocuments):
        self.trainer, self.documents, self.cache = trainer, documents.documents, documents.cache

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # As rank 0 sees them: the ranks have to agree on the work.
        (missing,) = broadcast_object_list([self.cache.missing()])
        if missing:
            self._fill(missing, args)
        self.trainer.accelerator.wait_for_everyone()
        if any(gather_object([bool(self.cache.missing())])):
            raise LMTPError(
                f"Not every process sees the hidden states in {self.cache.folder} that the others wrote: name a folder in "
                "hidden_cache_dir that all nodes share."
            )
        self._compare(self._probes(set(missing)))

    def _probes(self, fresh: set[int]) -> list[int]:
        """Documents spread over the shards that this run has not computed (`fresh`)."""
        layout = self.cache.layout
        old = [document for i, shard in enumerate(layout.shards) if i not in fresh for document in shard]
        old = [document for document in old if layout.lengths[document]]
        spread = np.linspace(0, len(old) - 1, _PROBES).astype(int) if old else ()
        return [old[place] for place in dict.fromkeys(map(int, spread))]

    def _compare(self, probes: list[int]) -> None:
        """Compare cached states with the model's, on every rank: ZeRO-3 demands it, and each rank reads its own disk.

        Raises:
            LMTPError: The model gives other states.
        """
        model = self.trainer.leap_model
        allowed = rounding_error(self._computes_in(), model.config.get_text_config().num_hidden_layers)
        worst = 0.0
        for document in probes:
            now = self._compute([document], apart=False)[document].float()
            difference = (now - self.cache.document(document).float()).norm(dim=-1) / now.norm(dim=-1)
            # The median, because rounding may send a single token to another expert.
            worst = max(worst, difference.nan_to_num(nan=math.inf).median().item())
        worst = max(gather_object([worst]))
        if worst > allowed:
            raise LMTPError(
                f"The hidden states in `{self.cache.folder}` are not this model's (they differ by {worst:.1%}, rounding "
                f"explains {allowed:.1%}), so its weights or its code have changed since: write another hidden_cache_dir, "
                "or delete this one."
            )

    def _computes_in(self) -> torch.dtype:
        args = self.trainer.args
        if getattr(self.trainer.leap_model, "quantization_method", None) is not None:
            return torch.bfloat16  # on some CPUs bitsandbytes multiplies in it, whatever it is asked for
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        return max(autocast, self.trainer.leap_model.dtype, key=lambda dtype: torch.finfo(dtype).eps)

    def _fill(self, missing: list[int], args) -> None:
        tokens = self.trainer._train_batch_size * max(self.cache.layout.lengths)
        work = [list(self._batches(missing[rank :: args.world_size], tokens)) for rank in range(args.world_size)]
        mine, steps = work[args.process_index], max(map(len, work))
        states: dict[int, torch.Tensor] = {}  # states of the current shard's documents
        apart = keeps_documents_apart(self.trainer.leap_model)
        silent = args.disable_tqdm or args.process_index != 0
        for step in tqdm(range(steps), desc="Hidden states", unit="batch", disable=silent):
            # Under ZeRO-3 every rank takes part in every forward. A rank without work repeats another one's.
            shard, batch = mine[step] if step < len(mine) else work[0][0]
            computed = self._compute(batch, apart)
            if step < len(mine):
                states.update(computed)
                if step + 1 == len(mine) or mine[step + 1][0] != shard:
                    self.cache.write(shard, torch.cat([states.pop(i) for i in self.cache.layout.shards[shard]]))

    def _batches(self, shards: list[int], tokens: int) -> Iterator[tuple[int, list[int]]]:
        """Shard by shard, batches of documents of similar lengths, at most `tokens` with padding."""
        lengths = self.cache.layout.lengths
        for shard in shards:
            batch: list[int] = []
            for document in sorted(self.cache.layout.shards[shard], key=lambda i: lengths[i]):
                if batch and lengths[document] * (len(batch) + 1) > tokens:
                    yield shard, batch
                    batch = []
                batch.append(document)
            yield shard, batch

    @torch.no_grad()
    def _compute(self, indices: list[int], apart: bool) -> dict[int, torch.Tensor]:
        model, documents = self.trainer.leap_model, [self.documents[i] for i in indices]
        lengths = [len(document["input_ids"]) for document in documents]
        attention = model.config._attn_implementation
        # A document alone in a row needs no border, and causal attention needs no mask for the padding behind it.
        alone = [[i] for i in range(len(documents))]
        rows = arrange(lengths, self.cache.layout.hidden_size, attention) if apart else alone
        batch = pack(documents, rows, self.trainer.processing_class.pad_token_id)
        inputs = {key: batch[key].to(model.device) for key in ("input_ids", "position_ids")}
        with self.trainer.accelerator.autocast():
            hidden = model.final_hidden_states(**inputs).to("cpu", DTYPE)  # (rows, length, hidden)
        return {indices[i]: hidden[row, place] for i, (row, place) in places(lengths, rows).items()}


def rounding_error(dtype: torch.dtype, layers: int) -> float:
    """Largest relative difference that rounding explains between two computations of a hidden state, one of them stored.

    Storing in bf16 rounds by up to 2^-8. Other batch shapes and kernels add up in another order: each layer writes twice
    into the residual stream, each time with an error that is uniform up to the unit roundoff u, u / sqrt(3) on average. The
    errors of 2 * layers writes add up as a random walk. Twice that is allowed. Matrix products of fp32 may run in TF32
    (2^-11).
    """
    unit = max(torch.finfo(dtype).eps / 2, 2**-11)
    return torch.finfo(DTYPE).eps / 2 + 2 * unit * math.sqrt(2 * layers / 3)
