"""Runs vLLM in its own environment and writes what it answered: python engine_run.py SETTINGS.json OUTPUT.json

Each case of the settings is one engine: `{"length": drafts, "options": of LLM, "prompts": [[ids]], "sampling": {...},
"abort": number of requests that are aborted after a step}`.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.outputs import CompletionOutput


PROPOSER = "lmtp_factory.serving.vllm.LeapProposer"


def answers(engine: LLM, case: dict) -> list[list[dict]]:
    """The answers of each request: token ids, text, log probabilities."""
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in case["prompts"]]
    sampling = SamplingParams(**case["sampling"])
    for number in range(case.get("abort", 0)):
        engine.llm_engine.add_request(f"aborted {number}", prompts[number], sampling)
    if case.get("abort"):
        for _ in range(3):
            engine.llm_engine.step()
        engine.llm_engine.abort_request([f"aborted {number}" for number in range(case["abort"])])
    return [[written(one) for one in request.outputs] for request in engine.generate(prompts, sampling, use_tqdm=False)]


def written(answer: CompletionOutput) -> dict:
    """What is compared of an answer."""
    steps = zip(answer.logprobs, answer.token_ids) if answer.logprobs else ()
    return {
        "ids": list(answer.token_ids),
        "text": answer.text,
        "stop": answer.stop_reason,
        "logprobs": [step[token].logprob for step, token in steps],
    }


def counters(engine: LLM) -> dict:
    """Drafts, accepted tokens by position, preemptions, tokens found in the prefix cache."""
    found = {}
    for metric in engine.get_metrics():
        name = metric.name.removeprefix("vllm:")
        if name in ("spec_decode_num_drafts", "num_preemptions", "prefix_cache_hits"):
            found[name] = metric.value
        elif name == "spec_decode_num_accepted_tokens_per_pos":
            found[name] = list(metric.values)
    return found


def main() -> None:
    settings, found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), []
    for case in settings["cases"]:
        speculative = {"model": PROPOSER, "num_speculative_tokens": case["length"]} if case["length"] else None
        engine = LLM(
            settings["model"], dtype="float32", enforce_eager=True, seed=0, disable_log_stats=False,
            speculative_config=speculative, **case["options"],
        )  # fmt: skip
        found.append({"answers": answers(engine, case), **counters(engine)})
        del engine
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
