"""What `loss_memory` compares: the arms, the step that each of them does, and the arithmetic of its memory."""

import importlib.util
from dataclasses import dataclass

import torch
from peak_memory import MIB
from torch import Tensor, nn

from lmtp_factory.config import LMTPConfig
from lmtp_factory.modeling.heads import LeapHeads
from lmtp_factory.modeling.losses.chunked import chunk_rows
from lmtp_factory.modeling.losses.targets import IGNORE_INDEX


ARMS = ("floor", "eager", "torch", "triton", "liger")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Point:
    """Sizes of one step."""

    vocab: int
    hidden: int
    heads: int
    tokens: int
    kind: str
    dtype: str
    masked: float

    def __str__(self) -> str:
        masked = f", {self.masked:.0%} of the targets masked" if self.masked else ""
        return (
            f"vocabulary {self.vocab:,}, hidden size {self.hidden:,}, {self.heads} {self.kind} heads, "
            f"{self.tokens:,} tokens, {self.dtype}{masked}"
        )

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def valid(self) -> int:
        """Targets of a head that are not masked."""
        return self.tokens - round(self.masked * self.tokens)

    @property
    def tflop(self) -> float:
        """Of the matmuls that the floor does: logits, features' gradient, and weight's gradient where trained."""
        matmuls = 3 if self.kind == "own" else 2
        return 2e-12 * self.heads * matmuls * self.valid * self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """Bytes held before the step: unembeddings, blocks and hidden states."""
        unembeddings = self.heads if self.kind == "own" else 1
        elements = unembeddings * self.vocab * self.hidden + self.heads * self.hidden**2 + self.tokens * self.hidden
        return self.itemsize * elements


def open_because(arm: str, device: torch.device) -> str | None:
    """What an arm lacks here."""
    if arm in ("triton", "liger") and device.type != "cuda":
        return "needs CUDA"
    if arm == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "needs the package liger-kernel"
    return None


def needed(arm: str, point: Point, device: torch.device) -> tuple[int, str]:
    """Bytes above `Point.weights` at the peak of a step, and how they come about."""
    n, rows, vocab, size = point.heads, point.tokens, point.vocab, point.itemsize
    features = rows * point.hidden * size  # of one head
    trained = (vocab if point.kind == "own" else 0) + point.hidden  # rows of a head's matrices with a gradient
    gradient = trained * point.hidden * size
    if arm == "eager":
        # Every head's fp32 log-softmax waits for the backward, which starts with two gradients of the last head: by the
        # log-softmax and by the logits. It ends at the first head, where only that head's are left, but all
        # gradients of weights have come. Of the features a head keeps SiLU's input and what its unembedding reads.
        logits = rows * vocab * 4
        first, last = (n + 2) * logits + 2 * n * features, 3 * logits + (n - 1) * gradient
        if first >= max(last, logits + n * gradient):
            return first, f"({n:,} heads + 2 gradients) x {rows:,} tokens x {vocab:,} logits x 4 bytes, and features"
        return max(last, logits + n * gradient), (
            f"3 x {rows:,} tokens x {vocab:,} logits x 4 bytes, and gradients of {n:,} x {trained:,} x {point.hidden:,}"
        )
    if arm == "liger":
        # Its chunks hold about as many logits as there are features; a product as large as the gradient is added to it.
        chunk_tokens = 1 << (-(-rows // -(-vocab // point.hidden)) - 1).bit_length()
        total = (n + 1) * gradient + 4 * n * features
    else:
        most = chunk_rows(vocab, device, DTYPES[point.dtype])
        chunk_tokens = -(-point.valid // max(1, -(-point.valid // most)))  # equal chunks
        total = n * gradient
        if arm != "floor" and size < 4:
            # The head at work sums up in fp32, and adds products in both dtypes, 64 MiB of them in fp32 at most.
            total += gradient + int(1.5 * min(2 * gradient, 64 * MIB))
    words = f"gradients of {n:,} x {trained:,} x {point.hidden:,}, one chunk of {chunk_tokens:,} x {vocab:,} logits"
    return total + chunk_tokens * vocab * size, words


class Problem:
    """Weights, hidden states and targets of a point, and the step of every arm."""

    def __init__(self, point: Point, device: torch.device):
        self.point, self.device = point, device
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[point.dtype])  # made in it: a copy in fp32 would have to fit too
        with torch.device(device):
            config = LMTPConfig(
                num_heads=point.heads, head_kind=point.kind, hidden_size=point.hidden, vocab_size=point.vocab
            )
            self.heads = LeapHeads(config)
            shared = point.kind == "shared"
            self.lm_head = nn.Linear(point.hidden, point.vocab, bias=False).requires_grad_(False) if shared else None
            self.hidden = torch.randn(point.tokens, point.hidden)
            self.targets = torch.randint(point.vocab, (point.heads, point.tokens))
            self.scales = torch.full((point.heads,), 1 / max(1, point.valid), dtype=torch.float32)
            for row in self.targets:
                row[torch.randperm(point.tokens)[point.valid :]] = IGNORE_INDEX
        torch.set_default_dtype(default)

    def step(self, arm: str) -> tuple[float | None, int]:
        """Forward and backward; the loss, and the bytes of the trained weights' gradients. The caller clears them."""
        if arm == "floor":
            return None, self._floor()
        if arm == "liger":
            loss = self._liger()
        else:
            loss, _, _ = self.heads(self.hidden, self.targets, self.scales, self.lm_head, implementation=arm)
        loss.backward()
        return loss.item(), sum(p.grad.nbytes for p in self.heads.parameters() if p.grad is not None)

    def _floor(self) -> int:
        """Bare matmuls on as many rows as have targets, a chunk's worth of logits at a time."""
        rows = self.hidden[: self.point.valid]
        most = chunk_rows(self.point.vocab, self.device, rows.dtype)
        chunks = rows.tensor_split(max(1, -(-len(rows) // most)))
        buffer = rows.new_empty(len(chunks[0]), self.point.vocab)
        product = torch.empty_like(chunks[0])
        gradients = []
        for weight in self._unembeddings():
            weight = weight.detach()
            if self.point.kind == "own":
                gradients.append(torch.zeros_like(weight))
            for chunk in chunks:
                logits = torch.mm(chunk, weight.t(), out=buffer[: len(chunk)])
                if self.point.kind == "own":
                    gradients[-1].addmm_(logits.t(), chunk)
                torch.mm(logits, weight, out=product[: len(chunk)])
        return sum(gradient.nbytes for gradient in gradients)

    def _liger(self) -> Tensor:
        """Liger with its defaults: masked rows are computed too, bf16 gradients are summed up in bf16."""
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        losses = [
            liger_fused_linear_cross_entropy(
                head.features(self.hidden), weight, targets, ignore_index=IGNORE_INDEX, reduction="sum"
            )
            for head, weight, targets in zip(self.heads.heads, self._unembeddings(), self.targets, strict=True)
        ]
        return (torch.stack(losses) * self.scales).sum()

    def _unembeddings(self) -> list[Tensor]:
        return [(head.unembed or self.lm_head).weight for head in self.heads.heads]
