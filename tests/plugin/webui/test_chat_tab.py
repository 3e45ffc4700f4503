"""The Chat and Export tabs' handlers, called as the page calls them."""

import pytest
import talkers
from test_panel import finished

from lmtp_factory.plugin.webui import answer
from lmtp_factory.plugin.webui.fields import with_key


def chat_inputs(board):
    """The chat tab's load button's inputs."""
    return next(fn for fn in board.blocks.fns.values() if fn.name == "load_model").inputs


def load(board, **values):
    data = {component: component.value for component in chat_inputs(board)}
    fixed = {"top__lang": "en", "top__model_name": "Custom", "top__template": "qwen"}
    data |= {board.component(id.replace("__", ".")): value for id, value in (fixed | values).items()}
    return list(board.engine.chatter.load_model(data))


def ask(board, strategy, language="en", question=talkers.QUESTIONS[0]):
    stream = next(fn for fn in board.blocks.fns.values() if fn.name == "stream")
    values = [component.value for component in stream.inputs]
    values[:3] = [[], [{"role": "user", "content": question}], language]
    values[stream.inputs.index(board.component("infer.max_new_tokens"))] = 40
    values[stream.inputs.index(board.component("infer.lmtp_decode"))] = strategy
    *_, (shown, messages) = board.engine.chatter.stream(*values)
    return shown[-1]["content"], messages[-1]["content"]


@pytest.fixture
def loaded(board, ending):
    greedy = '{"do_sample": false}'
    assert "loaded" in load(board, top__model_path=str(ending), infer__extra_args=greedy)[-1].lower()
    yield board
    board.engine.chatter.engine = None


def test_the_switch_decides_how_an_answer_is_decoded(loaded):
    answers = {strategy: ask(loaded, strategy) for strategy in ("auto", "backward", "forward", "off")}
    assert len({plain for _, plain in answers.values()}) == 1  # greedy
    for strategy, (shown, plain) in answers.items():
        assert shown.startswith(plain) and "lmtp-answer" in shown and "lmtp-answer" not in plain
        assert f"{strategy.replace('auto', 'backward')})" in shown
    assert "lmtp-drafted" in answers["backward"][0] and "lmtp-drafted" not in answers["off"][0]


def test_the_line_below_an_answer_speaks_the_pages_language(loaded):
    assert "tokens/s" in ask(loaded, "auto")[0]
    assert "词元/秒" in ask(loaded, "auto", language="zh")[0]


def test_a_model_without_heads_answers_as_upstream_does(board, llama):
    load(board, top__model_path=str(llama))
    try:
        shown, _ = ask(board, "backward")
        assert "lmtp-answer" not in shown
    finally:
        board.engine.chatter.engine = None


def test_a_warm_up_chosen_as_checkpoint_brings_its_heads(board, llama, stage1, folder, lines):
    run = folder / "saves" / "Custom" / "full" / "warm"
    run.parent.mkdir(parents=True)
    run.symlink_to(stage1)
    load(board, top__model_path=str(llama), top__finetuning_type="full", top__checkpoint_path="warm")
    board.engine.chatter.engine = None
    assert any("saves/Custom/full/warm/lmtp" in line for line in lines)


def test_heads_of_another_model_are_refused_on_the_page(board, llama, folder, monkeypatch):
    import gradio

    monkeypatch.setattr(gradio, "Warning", lambda message: None)
    finished(folder)
    told = load(board, top__model_path=str(llama), top__finetuning_type="full", top__checkpoint_path="run")
    assert not board.engine.chatter.loaded
    assert "saves/Custom/full/run/lmtp" in told[-1]


def export(board, choice, **values):
    from llamafactory.webui.components import export as module

    call = next(fn for fn in board.blocks.fns.values() if fn.name == "save_model")
    values = {board.component(id.replace("__", ".")): value for id, value in values.items()}
    values[board.component("export.lmtp_export")] = choice
    assert call.fn is module.save_model
    return list(call.fn(*(values.get(component, component.value) for component in call.inputs)))


def test_a_warm_up_is_exported_with_its_base(board, llama, stage1, folder):
    run = folder / "saves" / "Custom" / "full" / "warm"
    run.parent.mkdir(parents=True)
    run.symlink_to(stage1)
    chosen = dict(
        top__lang="en", top__model_name="Custom", top__model_path=str(llama), top__finetuning_type="full",
        top__checkpoint_path="warm", top__template="qwen",
    )  # fmt: skip
    for choice, has_heads in (("heads", True), ("ntp", False)):
        export(board, choice, **chosen, export__export_dir=str(folder / choice))
        assert (folder / choice / "config.json").is_file()
        assert (folder / choice / "lmtp" / "model.safetensors").is_file() == has_heads


def test_an_export_that_is_refused_says_why(board, llama, folder, monkeypatch):
    import gradio

    monkeypatch.setattr(gradio, "Warning", lambda message: None)
    chosen = dict(
        top__lang="en", top__model_name="Custom", top__model_path=str(llama), top__finetuning_type="full",
        top__checkpoint_path=str(llama), top__template="qwen",
    )  # fmt: skip
    told = export(board, "heads", **chosen, export__export_dir=str(folder / "out"))
    assert told[-1].startswith("lmtp_export: heads asks for leap heads")


def test_extra_arguments_keep_what_is_written():
    assert with_key('{"a": 1}', "k", "v") == '{"k": "v", "a": 1}'
    assert with_key('{"k": "mine"}', "k", "v") == '{"k": "mine"}'
    assert with_key("{", "k", "v") == "{"


def test_drafted_tokens():
    assert answer.drafted([3, 1], 5) == [False, True, True, False, False]
    assert answer.drafted([3], 3) == [False, True, True]
    assert answer.drafted([], 2) == [False, False]


def test_pieces_do_not_cut_characters():
    text = "aé$\n\n<b>"
    tokens = list(text.encode())

    def decode(ids):
        return bytes(ids).decode(errors="replace")

    marked = [place % 2 == 1 for place in range(len(tokens))]
    pieces = list(answer.pieces_of(tokens, marked, decode))
    assert "".join(piece for piece, _ in pieces) == text
    assert not any("\ufffd" in piece for piece, _ in pieces)
    assert answer._html(text) == "aé&#36;<br><br>&lt;b&gt;"
