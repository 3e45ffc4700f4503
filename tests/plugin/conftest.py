import logging

import pytest
import talkers
import tiny


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Directory of the tiny dataset."""
    directory = tmp_path_factory.mktemp("data")
    tiny.tiny_dataset(directory)
    return directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny Llama with tied embeddings, as most small models have."""
    return tiny.tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama", tie=True)


@pytest.fixture(scope="session")
def stage1(tmp_path_factory, llama, data):
    """Output of a short stage 1."""
    import runs

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
    return talkers.endless(tmp_path_factory.mktemp("models") / "endless")


@pytest.fixture(scope="session")
def ending(tmp_path_factory):
    """A heads export whose answers end."""
    return talkers.ending(tmp_path_factory.mktemp("models") / "ending")


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
    model = talkers.chat_model(ending, lmtp_decode="off")
    return {question: talkers.ask(model, question) for question in talkers.QUESTIONS}


@pytest.fixture(scope="session")
def streamed(ending):
    """The same as streams: bytes that are no text may be shown otherwise there."""
    model = talkers.chat_model(ending, lmtp_decode="off")
    return {question: talkers.stream(model, question) for question in talkers.QUESTIONS}


@pytest.fixture(scope="session")
def adapter(llama, data, stage1, tmp_path_factory):
    """Output of a short stage 2 with LoRA."""
    import runs

    output = tmp_path_factory.mktemp("runs") / "adapter"
    runs.train(llama, data, output, stage="lmtp2", finetuning_type="lora", stage1_pretrained_path=str(stage1))
    return output
