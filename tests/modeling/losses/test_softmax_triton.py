"""The Triton kernel against its plain twin and fp64 autograd: in Triton's interpreter, compiled for GPUs, and on one.

Triton decides when it is imported whether it interprets, so this file runs itself as a script for the parity cases.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lmtp_factory.modeling.losses import softmax


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = ("float32", "bfloat16", "float16")
SOFTCAPS = (None, 30.0)


def cases(*sizes):
    return {
        f"{rows}x{vocabulary} {dtype} softcap {softcap}": dict(
            rows=rows, vocabulary=vocabulary, dtype=dtype, softcap=softcap
        )
        for rows, vocabulary in sizes
        for dtype in DTYPES
        for softcap in SOFTCAPS
    }


CASES = cases((1, 7), (4, 1), (5, 1001), (33, 4097), (3, 20011))  # the last takes more than one block
for dtype in DTYPES:
    for softcap in SOFTCAPS:
        small = dict(rows=5, vocabulary=9001, dtype=dtype, softcap=softcap)
        CASES[f"logits of 1e4, {dtype} softcap {softcap}"] = dict(small, scale=1e4)
        CASES[f"slice of a buffer, {dtype} softcap {softcap}"] = dict(small, margin=3)
        CASES[f"logits of -inf, {dtype} softcap {softcap}"] = dict(small, banned=True)


def softmax_triton():
    # Not before the interpreter is switched on, or Triton found.
    from lmtp_factory.modeling.losses import softmax_triton

    return softmax_triton


def deviations(rows, vocabulary, dtype, softcap, scale=4.0, margin=0, banned=False, device="cpu"):
    """How far the kernel is from fp64 autograd and from its twin, beyond what rounding to ``dtype`` explains."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, dtype)
    buffer = torch.randn(rows + 2 * margin, vocabulary + 2 * margin, generator=generator) * scale
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    buffer = buffer.to(device, dtype)
    logits = buffer[margin : margin + rows, margin : margin + vocabulary]
    targets[::2] = logits[::2].argmax(-1)  # half of the rows are hits
    if banned:
        allowed = F.one_hot(targets, vocabulary).bool()
        allowed[:, ::3] = True
        logits.masked_fill_(~allowed, float("-inf"))
    before, twin = buffer.clone(), logits.clone()

    exact = logits.double().requires_grad_()
    exact_losses = F.cross_entropy(softcap * (exact / softcap).tanh() if softcap else exact, targets, reduction="none")
    exact_losses.sum().backward()
    exact_losses, exact_gradient = exact_losses.detach(), exact.grad
    twin_losses, twin_hits = softmax.softmax_gradient_(twin, targets, softcap)
    losses, hits = softmax_triton().softmax_gradient_(logits, targets, softcap)

    step = torch.finfo(dtype).eps * exact_gradient.abs()  # GPUs round by half of it; the interpreter truncates bf16
    inside = torch.zeros_like(before, dtype=torch.bool)
    inside[margin : margin + rows, margin : margin + vocabulary] = True
    return {
        "loss": ((losses - exact_losses).abs() / (1 + exact_losses)).max().item(),
        "loss of the twin": ((losses - twin_losses).abs() / (1 + exact_losses)).max().item(),
        "gradient": ((logits - exact_gradient).abs() - step).max().item(),
        "gradient of the twin": ((logits.double() - twin.double()).abs() - step).max().item(),
        "hits": (hits != twin_hits).sum().item(),
        "neighbours": ((buffer != before) & ~inside).sum().item(),
        "kinds": [str(losses.dtype), str(hits.dtype), *losses.shape, *hits.shape],
    }


def agrees(found, rows):
    assert found.pop("kinds") == ["torch.float32", "torch.bool", rows, rows]
    assert found == pytest.approx(dict.fromkeys(found, 0), abs=1e-5)  # nan is no approximation either


@pytest.fixture(scope="module")
def interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel_agrees(interpreted, case):
    agrees(interpreted[case], CASES[case]["rows"])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_kernel_compiles_for_gpus(capability, dtype, softcap, tmp_path, monkeypatch):
    """The interpreter accepts what the compiler does not, such as a variable that changes its type in a loop."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {
        "logits": f"*{dtype}",
        "targets": "*i64",
        "losses": "*fp32",
        "hits": "*i1",
        "stride": "i32",
        "softcap": "fp32" if softcap else "constexpr",
        "VOCABULARY": "constexpr",
        "BLOCK": "constexpr",
    }
    constants = {"VOCABULARY": 152064, "BLOCK": 8192} | ({} if softcap else {"softcap": None})
    source = ASTSource(softmax_triton()._softmax_gradient, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16})
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    assert re.search(r"arith\.muli %row\S*, .* : i64", compiled.asm["ttir"]), "the offset of a row has to take 64 bits"


def test_no_rows_launch_nothing():
    losses, hits = softmax_triton().softmax_gradient_(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long))
    assert (losses.shape, losses.dtype, hits.shape, hits.dtype) == ((0,), torch.float32, (0,), torch.bool)


def test_what_the_kernel_cannot_read_is_refused():
    targets = torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match="float64"):
        softmax_triton().softmax_gradient_(torch.zeros(2, 7, dtype=torch.float64), targets)
    with pytest.raises(ValueError, match="2 elements apart"):
        softmax_triton().softmax_gradient_(torch.zeros(2, 14)[:, ::2], targets)


GPU_CASES = CASES | cases((300, 32000), (70, 152064), (40, 262144))


@on_gpu
@pytest.mark.parametrize("case", GPU_CASES)
def test_kernel_agrees_on_a_gpu(case):
    agrees(deviations(**GPU_CASES[case], device="cuda"), GPU_CASES[case]["rows"])


@on_gpu
def test_rows_beyond_32_bits_on_a_gpu():
    buffer = torch.empty(3, 2**30, dtype=torch.bfloat16, device="cuda")  # 6 GB; the last row begins at element 2**31
    logits = buffer[:, :1001]
    logits.copy_(torch.randn(3, 1001))
    twin, targets = logits.clone(), torch.tensor([0, 500, 1000], device="cuda")
    twin_losses, _ = softmax.softmax_gradient_(twin, targets)
    losses, _ = softmax_triton().softmax_gradient_(logits, targets)
    torch.testing.assert_close(losses, twin_losses)
    torch.testing.assert_close(logits, twin)


if __name__ == "__main__":
    print(json.dumps({case: deviations(**arguments) for case, arguments in CASES.items()}))
