"""Leap heads in vLLM's V1 model runner.

    vllm serve EXPORT --speculative-config '{"model": "lmtp_factory.serving.vllm.LeapProposer", "num_speculative_tokens": 5}'

vLLM builds the class named there in the worker and verifies what it proposes, as a chain, with its own rejection sampler. A
custom class is given token ids only, but leap heads read hidden states, which `propose_draft_token_ids` of the runner
has. That method is wrapped for `LeapProposer` and calls the original for every other proposer.
"""

import functools
import inspect
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from torch import Tensor, nn

from .. import geometry
from ..errors import LMTPError
from ..modeling.checkpoint import base_fingerprint, check_base, load_heads
from ..modeling.heads import softcap_of
from .chains import DraftModel, draft_chains
from .vllm_checks import check_heads, check_settings, check_version, lm_head_of, longest_draft, prove_final_states
from .windows import RequestWindows, Rows


if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


# The first parameters of the wrapped method, which drafts are made from.
_PARAMETERS = ("self", "scheduler_output", "sampled_token_ids", "sampling_metadata", "hidden_states")


class LeapProposer:
    """Drafts the next tokens of every request with leap heads.

    Args:
        config: vLLM's configuration.

    Raises:
        LMTPError: Another version of vLLM, no heads beside the model, heads of another model, more tokens than the heads
            reach, or a setting under which drafts would read something else than in training.
    """

    def __init__(self, config: "VllmConfig"):
        wrap_runner()
        model = config.model_config
        path = model.model if os.path.isdir(model.model) else snapshot_download(model.model, revision=model.revision)
        self.heads = load_heads(path)
        self.model_config, self.dtype = model.hf_config, model.dtype
        self.max_requests = config.scheduler_config.max_num_seqs
        check_base(self.heads.config, model.hf_config, base_fingerprint(path))
        check_heads(self.heads.config, config.speculative_config.num_speculative_tokens)
        check_settings(self.heads.config, config)
        self.model: DraftModel | None = None
        self.windows: RequestWindows | None = None

    def load_model(self, target: nn.Module) -> None:
        """Bind the heads to the loaded model.

        Args:
            target: vLLM's model.

        Raises:
            LMTPError: The heads read embeddings or the LM head, and the model has none that they can read, or the model's
                logits are not its LM head on its final hidden states.
        """
        config, weight = self.heads.config, next(target.parameters())
        if config.reads_token and not hasattr(target, "embed_input_ids"):
            raise LMTPError(f"{type(target).__name__} has no embed_input_ids: train heads of head_inputs: state.")
        lm_head = lm_head_of(target, config) if config.head_kind == "shared" else None
        heads = self.heads.to(device=weight.device, dtype=self.dtype).requires_grad_(False).eval()
        embed = target.embed_input_ids if config.reads_token else None
        self.model = DraftModel(heads, self.model_config, embed, lm_head)
        prove_final_states(target, config.hidden_size, softcap_of(self.model))
        size = geometry.window(config.offsets)
        self.windows = RequestWindows(size, config.hidden_size, self.max_requests, self.dtype, weight.device)

    def propose(self, *args: object, **kwargs: object) -> list[list[int]]:
        """Refuse vLLM's own call, which has no hidden states.

        Raises:
            LMTPError: Always. The wrapped method of the runner calls `draft`.
        """
        raise LMTPError(
            "vLLM asked for drafts without hidden states: its model runner is not the one that lmtp_factory knows. Serve "
            "without --speculative-config."
        )

    def draft(
        self, runner: "GPUModelRunner", scheduled: "SchedulerOutput", sampled: Sequence[Sequence[int]], hidden: Tensor
    ) -> list[list[int]]:
        """Draft the next tokens of every request in a step's batch.

        Args:
            runner: The model runner.
            scheduled: What the step computed.
            sampled: Accepted drafts and the token after them of each request; empty while the prompt is computed.
            hidden: (rows, hidden) final hidden states of the step, request after request.

        Returns:
            The drafts of each request, none where nothing was sampled.
        """
        batch = runner.input_batch
        rows = rows_of_step(
            batch.req_ids,
            batch.num_computed_tokens_cpu[: len(batch.req_ids)].tolist(),
            scheduled.num_scheduled_tokens,
            {request: len(drafts) for request, drafts in scheduled.scheduled_spec_decode_tokens.items()},
            sampled,
        )
        self.windows.push(rows, hidden, runner.requests)
        chains: list[list[int]] = [[] for _ in rows]
        drafting = [number for number, tokens in enumerate(sampled) if tokens]
        length = min(scheduled.num_spec_tokens_to_schedule, longest_draft(self.heads.config))
        if drafting and length:
            window = self.windows.window(
                [rows[number].request for number in drafting], [sampled[number][-1] for number in drafting]
            )
            for number, chain in zip(drafting, draft_chains(self.model, window, length)):
                chains[number] = chain
        return chains


def rows_of_step(
    requests: Sequence[str],
    computed: Sequence[int],
    scheduled: dict[str, int],
    drafted: dict[str, int],
    sampled: Sequence[Sequence[int]],
) -> list[Rows]:
    """Return which rows of a step are part of the requests' texts.

    Args:
        requests: Ids of the step's requests, in the order of their rows.
        computed: Number of tokens of each whose keys and values existed before the step.
        scheduled: Number of rows by id.
        drafted: Number of drafts among them by id; they are the last rows of their request.
        sampled: Accepted drafts and the token after them of each request; empty while the prompt is computed.
    """
    rows, first = [], 0
    for request, start, tokens in zip(requests, computed, sampled, strict=True):
        rejected = drafted.get(request, 0) - max(len(tokens) - 1, 0)
        rows.append(Rows(request, start, first, scheduled[request] - rejected))
        first += scheduled[request]
    return rows


def wrap_runner() -> None:
    """Wrap the runner's method that asks for drafts, once a process.

    Raises:
        LMTPError: vLLM is of another version, or its method has other parameters.
    """
    from vllm import __version__
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner.propose_draft_token_ids
    if getattr(original, "of_lmtp_factory", False):
        return
    check_version(__version__)
    found = tuple(inspect.signature(original).parameters)
    if found[: len(_PARAMETERS)] != _PARAMETERS:
        raise LMTPError(
            f"GPUModelRunner.propose_draft_token_ids of vLLM {__version__} takes {', '.join(found)}, which lmtp_factory "
            "does not know: serve without --speculative-config."
        )

    @functools.wraps(original)
    def propose_draft_token_ids(
        self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, *args, **kw
    ):
        if not isinstance(self.drafter, LeapProposer):
            return original(self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, *args, **kw)
        # Drafts without probabilities: the rejection sampler takes them as certain, as it takes those of an n-gram.
        self._draft_probs = self._draft_prob_req_ids = None
        return self.drafter.draft(self, scheduler_output, sampled_token_ids, hidden_states)

    propose_draft_token_ids.of_lmtp_factory = True
    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids
