"""The chunked loss against its eager twin: every kind of head, dtype and chunk size."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from lmtp_factory.config import LMTPConfig
from lmtp_factory.modeling.heads import LeapHeads
from lmtp_factory.modeling.losses import HeadSpec, chunked
from lmtp_factory.modeling.losses.chunked import LOGIT_BYTES, chunk_rows, chunked_loss
from lmtp_factory.modeling.losses.implementation import as_plain_linear
from lmtp_factory.modeling.losses.rows import in_place_cross_entropy
from lmtp_factory.modeling.losses.targets import IGNORE_INDEX


HIDDEN, VOCAB = 11, 101
CPU = torch.device("cpu")


def trial(kind: str, rows: int = 33, heads: int = 3, next_token: bool = True, dtype=torch.float64, bias: bool = False):
    """(heads, lm_head, hidden, targets, scales) with weights that are not at their start, and some targets masked."""
    torch.manual_seed(rows)
    config = LMTPConfig(num_heads=heads, head_kind=kind, head_layers=2, hidden_size=HIDDEN, vocab_size=VOCAB)
    leap_heads = LeapHeads(config).to(dtype)
    lm_head = nn.Linear(HIDDEN, VOCAB, bias=bias, dtype=dtype)
    for parameter in [*leap_heads.parameters(), *lm_head.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(rows, HIDDEN, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCAB, (heads + next_token, rows))
    targets[torch.rand(targets.shape) < 0.3] = IGNORE_INDEX
    return leap_heads, lm_head, hidden, targets, torch.rand(len(targets))


def outcome(implementation, leap_heads, lm_head, hidden, targets, scales, softcap=None):
    """Loss, sums, hits, and the gradients of hidden states and every trained parameter, of three times the loss."""
    loss, sums, hits = leap_heads(hidden, targets, scales, lm_head, softcap=softcap, implementation=implementation)
    wanted = [t for t in (hidden, *leap_heads.parameters(), *lm_head.parameters()) if t.requires_grad]
    gradients = torch.autograd.grad(3 * loss, wanted, allow_unused=True)
    return loss, sums, hits, [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, gradients)]


def agree(ours, twin):
    for mine, theirs in zip(ours[:2], twin[:2]):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    assert torch.equal(ours[2], twin[2])
    assert len(ours[3]) == len(twin[3])
    for mine, theirs in zip(ours[3], twin[3]):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("next_token", [True, False])
@pytest.mark.parametrize("kind", ["own", "shared"])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 64])
def test_equals_the_twin(monkeypatch, kind, next_token, softcap, rows_per_chunk):
    monkeypatch.setattr(chunked, "chunk_rows", lambda *_: rows_per_chunk)
    parts = trial(kind, next_token=next_token)
    agree(outcome("torch", *parts, softcap), outcome("eager", *parts, softcap))


@pytest.mark.parametrize("frozen", ["lm_head", "hidden", "heads", "blocks"])
@pytest.mark.parametrize("kind", ["own", "shared"])
def test_equals_the_twin_with_parts_frozen(kind, frozen):
    leap_heads, lm_head, hidden, targets, scales = trial(kind)
    for part in {"lm_head": [lm_head], "heads": [leap_heads], "blocks": [h.blocks for h in leap_heads.heads]}.get(
        frozen, []
    ):
        part.requires_grad_(False)
    hidden.requires_grad_(frozen != "hidden")
    parts = leap_heads, lm_head, hidden, targets, scales
    agree(outcome("torch", *parts), outcome("eager", *parts))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.booleans(), st.booleans(), st.sampled_from(["own", "shared"]))
def test_equals_the_twin_whatever_the_shape(rows, heads, next_token, bias, kind):
    parts = trial(kind, rows, heads, next_token, bias=bias)
    agree(outcome("torch", *parts), outcome("eager", *parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["own", "shared"])
def test_low_precision_is_as_near_to_fp64_as_the_twin(kind, dtype):
    exact = outcome("eager", *trial(kind, rows=200))

    def errors(implementation):
        leap_heads, lm_head, hidden, targets, scales = trial(kind, rows=200)
        low = hidden.detach().to(dtype).requires_grad_()
        found = outcome(implementation, leap_heads.to(dtype), lm_head.to(dtype), low, targets, scales)
        return [((g - e).norm() / e.norm()).item() for g, e in zip(found[3], exact[3])]

    ours, twins = errors("torch"), errors("eager")
    assert sum(ours) <= 1.2 * sum(twins)
    assert max(ours) <= 1.5 * max(twins)


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_fp16_survives_means_over_many_tokens_and_a_loss_scale(kind):
    leap_heads, lm_head, hidden, targets, _ = trial(kind, rows=200, dtype=torch.float32)
    scales = torch.full((len(targets),), 1 / 131_072)  # of a mean over a large batch: nearly nothing in fp16
    exact = outcome("eager", leap_heads, lm_head, hidden, targets, scales)
    low = hidden.detach().half().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss, _, _ = leap_heads(low, targets, scales, lm_head)
    wanted = [low, *leap_heads.parameters(), *lm_head.parameters()]
    found = torch.autograd.grad(65_536 * loss, wanted)  # GradScaler's first scale: more than fp16 can hold
    for gradient, expected in zip(found, exact[3], strict=True):
        error = gradient.float() / 65_536 - expected / 3
        assert error.norm() < 2e-3 * (expected / 3).norm()


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_under_autocast_as_the_twin(kind):
    parts = trial(kind, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, twin = outcome("torch", *parts), outcome("eager", *parts)
    torch.testing.assert_close(ours[1], twin[1], rtol=1e-3, atol=0)
    for mine, theirs in zip(ours[3], twin[3], strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 2e-2 * theirs.norm()


def test_fp32_sums_keep_what_bf16_sums_would_lose(monkeypatch):
    monkeypatch.setattr(chunked, "chunk_rows", lambda *_: 1)  # 2,000 gradients to add up, each a 2,000th of the sum
    monkeypatch.setattr(chunked, "_PRODUCT_BYTES", 4 * HIDDEN * 10)  # and a weight's in eleven parts
    lm_head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=torch.bfloat16)
    hidden, targets = torch.ones(2000, HIDDEN, dtype=torch.bfloat16), torch.zeros(1, 2000, dtype=torch.long)
    logits = torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad():
        lm_head.weight.copy_(logits)
    loss, _, _ = run(hidden, targets, lm_head)
    (gradient,) = torch.autograd.grad(loss, lm_head.weight)
    expected = torch.full((VOCAB,), 2000 / VOCAB)
    expected[0] -= 2000
    torch.testing.assert_close(gradient[:, 0].float(), expected, rtol=2**-8, atol=0)


def run(hidden, targets, unembedding, features=lambda hidden, rows: hidden, **options):
    """One head without blocks."""
    scales, heads = torch.ones(len(targets)), [HeadSpec(features, unembedding, unembedding.out_features)]
    return chunked_loss(hidden, targets, scales, heads, row_loss=in_place_cross_entropy("torch"), **options)


def test_masked_rows_are_dropped_and_chunks_are_even():
    seen = []

    def features(rows, numbers):
        seen.append(len(rows))
        return rows

    targets = torch.zeros(1, 40, dtype=torch.long)
    targets[:, :10] = IGNORE_INDEX
    run(torch.randn(40, HIDDEN), targets, nn.Linear(HIDDEN, VOCAB), features, rows_per_chunk=29)
    assert seen == [15, 15]  # and not 29 and a single one


def test_no_valid_target_gives_zero_loss_and_zero_gradients():
    lm_head = nn.Linear(HIDDEN, VOCAB)
    loss, sums, hits = run(torch.randn(4, HIDDEN), torch.full((1, 4), IGNORE_INDEX), lm_head)
    loss.backward()
    assert loss == 0 and sums.sum() == 0 and hits.sum() == 0
    assert torch.equal(lm_head.weight.grad, torch.zeros_like(lm_head.weight))  # and not None: DDP waits for all


def test_heads_that_share_an_unembedding_share_its_gradient(monkeypatch):
    made = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda t, **kw: made.append(t.shape) or zeros_like(t, **kw))
    leap_heads, lm_head, hidden, targets, scales = trial("shared", heads=3)
    leap_heads(hidden, targets, scales, lm_head)
    assert made.count((VOCAB, HIDDEN)) == 1


def test_evaluation_takes_no_gradients(monkeypatch):
    parts = trial("own")
    expected = parts[0](*parts[2:], parts[1])[0].detach()
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        loss, _, _ = parts[0](*parts[2:], parts[1])
    assert loss == expected and not loss.requires_grad


def test_a_second_backward_fails_rather_than_lies():
    loss, _, _ = run(torch.randn(4, HIDDEN), torch.ones(1, 4, dtype=torch.long), nn.Linear(HIDDEN, VOCAB))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward once"):
        loss.backward()


class Adapted(nn.Module):
    """An LM head inside a model, for PEFT to find."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=dtype)


@pytest.mark.parametrize("tuned", ["lora", "in full"])
def test_an_lm_head_under_peft(tuned):
    options = {"target_modules": ["lm_head"]} if tuned == "lora" else {"modules_to_save": ["lm_head"]}
    model = Adapted() if tuned == "lora" else nn.Sequential(nn.Linear(HIDDEN, HIDDEN), Adapted())
    if tuned == "in full":
        options["target_modules"] = ["0"]
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))
    lm_head = next(m for n, m in adapted.named_modules() if n.endswith("lm_head")).to(torch.float64)
    leap_heads, _, hidden, targets, scales = trial("shared")
    assert (as_plain_linear(lm_head) is None) == (tuned == "lora")
    trained = [p for p in lm_head.parameters() if p.requires_grad]
    assert trained
    agree(
        outcome("torch", leap_heads, lm_head, hidden, targets, scales),
        outcome("eager", leap_heads, lm_head, hidden, targets, scales),
    )


def test_a_quantised_lm_head():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantised = bitsandbytes.nn.Linear8bitLt(64, VOCAB, bias=False, has_fp16_weights=False)
    assert as_plain_linear(quantised) is None


def test_torch_compile_breaks_its_graph_at_the_loss():
    leap_heads, lm_head, hidden, targets, scales = trial("own", dtype=torch.float32)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def step(hidden):
        return 2 * leap_heads(2 * hidden, targets, scales, lm_head)[0]

    step(hidden).backward()
    compiled, hidden.grad = hidden.grad, None
    (2 * leap_heads(2 * hidden, targets, scales, lm_head)[0]).backward()
    torch.testing.assert_close(compiled, hidden.grad)
    assert graphs and not any("mm" in str(node.target) for graph in graphs for node in graph.graph.nodes)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(vocab_size=st.integers(1, 300_000))
def test_a_chunk_fits_its_budget(vocab_size, device, dtype):
    rows = chunk_rows(vocab_size, torch.device(device), dtype)
    assert rows * vocab_size * dtype.itemsize <= LOGIT_BYTES[device] < (rows + 1) * vocab_size * dtype.itemsize


def test_hits_count_what_no_logit_is_above():
    lm_head = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        lm_head.weight.copy_(torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]]))
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    _, sums, hits = run(hidden, torch.tensor([[0, 1, 2]]), lm_head)
    assert hits.tolist() == [2]  # a tie is a hit for both
    torch.testing.assert_close(sums[0], F.cross_entropy(lm_head(hidden), torch.tensor([0, 1, 2]), reduction="sum"))
