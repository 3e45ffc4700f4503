import pytest


class Board:
    """The Board's components in this process, with nobody looking at them.

    Attributes:
        engine: upstream's.
        blocks: what a browser would show.
    """

    def __init__(self):
        from llamafactory.webui import interface

        engines = []

        class Engine(interface.Engine):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                engines.append(self)

        upstream, interface.Engine = interface.Engine, Engine
        try:
            self.blocks = interface.create_ui()
        finally:
            interface.Engine = upstream
        self.engine = engines[0]

    def component(self, id):
        return self.engine.manager.get_elem_by_id(id)

    def data(self, stage: str, **values) -> dict:
        """What a button of the Train tab gets: its inputs' values, some of them changed (``top__lang="en"``)."""
        fixed = dict(
            train__training_stage=stage, train__dataset=["tiny"], train__output_dir="run", train__config_path="saved.yaml"
        )  # fmt: skip
        return self._inputs("preview_train", fixed | values)

    def evaluation_data(self, **values) -> dict:
        """The same for the Evaluate tab."""
        return self._inputs("preview_eval", values)

    def _inputs(self, handler: str, values: dict) -> dict:
        fixed = dict(top__lang="en", top__model_name="Custom", top__model_path="some/model")
        inputs = next(fn for fn in self.blocks.fns.values() if fn.name == handler).inputs
        data = {component: component.value for component in inputs}
        return data | {self.component(id.replace("__", ".")): value for id, value in (fixed | values).items()}


@pytest.fixture(scope="session")
def board(tmp_path_factory):
    """Built in a folder of its own: upstream writes into the current one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("board"))
        yield Board()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, where saves/ and saved arguments appear."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
