"""Leap heads in vLLM's V1 model runner.

    vllm serve EXPORT --speculative-config '{"model": "lmtp_factory.serving.vllm.LeapProposer", "num_speculative_tokens": 5}'

vLLM builds the class named there in the worker and verifies what it proposes, as a chain, with its own rejection sampler. A
class of one's own is given token ids only, but leap heads read hidden states, which `propose_draft_token_ids` of the runner
has. That method is wrapped for `LeapProposer` and calls the original for every other proposer.
"""

import functools
import inspect
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import geometry
from ..errors import LMTPError
from ..modeling.checkpoint import base_fingerprint, check_base, load_heads
from .chains import DraftModel, draft_chains
from .windows import RequestWindows, Rows


if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


logger = logging.getLogger(__name__)

# Releases whose V1 model runner is known. vLLM 0.33 has a V2 runner too, which it leaves for V1 with a class of one's own.
VERSIONS = ("0.32", "0.33")
# Those that have served with these heads. Of the others only the code was read.
SERVED = ("0.32",)
# The first parameters of the wrapped method, which drafts are made from.
_PARAMETERS = ("self", "scheduler_output", "sampled_token_ids", "sampling_metadata", "hidden_states")


class LeapProposer:
    """Drafts the next tokens of every request with leap heads.

    Args:
        config: vLLM's configuration.

    Raises:
        LMTPError: Another version of vLLM, no heads beside the model, heads of another model, more tokens than the heads
            reach, or a part of the model that drafts need is not in this process.
    """

    def __init__(self, config: "VllmConfig"):
        wrap_runner()
        path = config.model_config.model
        self.heads = load_heads(path)
        self.config, self.dtype = config.model_config.hf_config, config.model_config.dtype
        check_base(self.heads.config, self.config, base_fingerprint(path))
        if self.heads.config.reads_layers:
            raise LMTPError(
                f"The heads of {path} read all layers (head_inputs: layers), which vLLM does not hand out: serve heads of "
                "head_inputs: state or state_token."
            )
        deepest = geometry.reach(self.heads.config.offsets) - 1
        asked = config.speculative_config.num_speculative_tokens
        if asked > deepest:
            raise LMTPError(
                f"num_speculative_tokens is {asked}, but the heads of {path} reach {deepest} tokens beyond the next one: "
                f"write {deepest} or less."
            )
        self.shards = config.parallel_config.tensor_parallel_size
        if self.shards > 1 and self.heads.config.head_kind == "shared":
            raise LMTPError(
                f"The heads of {path} share the LM head, which tensor parallelism cuts into {self.shards} parts: write "
                "--tensor-parallel-size 1 or train heads of head_kind: own."
            )
        self.capacity = config.scheduler_config.max_num_seqs
        self.model: DraftModel | None = None
        self.windows: RequestWindows | None = None

    def load_model(self, target: nn.Module) -> None:
        """Bind the heads to the loaded model.

        Args:
            target: vLLM's model.

        Raises:
            LMTPError: The heads read embeddings or the LM head, and this process has none.
        """
        config, weight = self.heads.config, next(target.parameters())
        if config.reads_token and not _has_weight(getattr(target, "model", target), "embed_tokens"):
            raise LMTPError(
                "These heads read token embeddings, which the last stage of pipeline parallelism does not have: write "
                "--pipeline-parallel-size 1 or train heads of head_inputs: state."
            )
        lm_head = None
        if config.head_kind == "shared":
            if not _has_weight(target, "lm_head"):
                raise LMTPError(f"{type(target).__name__} shows no lm_head.weight: train heads of head_kind: own.")
            lm_head = target.lm_head.weight.detach()[: config.vocab_size]  # vLLM pads the vocabulary
        heads = self.heads.to(device=weight.device, dtype=self.dtype).requires_grad_(False).eval()
        self.model = DraftModel(heads, self.config, target.embed_input_ids, lm_head)
        size = geometry.window(config.offsets)
        self.windows = RequestWindows(size, config.hidden_size, self.capacity, self.dtype, weight.device)

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
            sampled: Accepted drafts and the token after them of each request; nothing within a prompt.
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
        length = min(scheduled.num_spec_tokens_to_schedule, geometry.reach(self.heads.config.offsets) - 1)
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
        sampled: Accepted drafts and the token after them of each request; nothing within a prompt.
    """
    rows, first = [], 0
    for request, start, tokens in zip(requests, computed, sampled, strict=True):
        rejected = drafted.get(request, 0) - max(len(tokens) - 1, 0)
        rows.append(Rows(request, start, first, scheduled[request] - rejected))
        first += scheduled[request]
    return rows


def check_version(version: str | None) -> None:
    """Check vLLM's version; None if it is not installed.

    Raises:
        LMTPError: The model runner of this version was not tried.
    """
    if version is None:
        raise LMTPError(
            f"vLLM is not installed: in an environment of its own install vllm=={SERVED[-1]}.* and then pip install "
            "--no-deps lmtp_factory."
        )
    release = re.match(r"\d+\.\d+", version)
    if release is None or release[0] not in VERSIONS:
        raise LMTPError(
            f"vLLM {version} is installed, but leap heads know vLLM {' and '.join(VERSIONS)} only: install one of them, or "
            "serve without --speculative-config."
        )
    if release[0] not in SERVED:
        logger.warning("Leap heads have not been run with vLLM %s, only with vLLM %s.", version, ", ".join(SERVED))


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


def _has_weight(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(getattr(module, name, None), "weight", None), torch.Tensor)
