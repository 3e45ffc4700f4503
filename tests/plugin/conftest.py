import pytest
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
