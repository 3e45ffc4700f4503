"""The Chat tab's handlers, called as the page calls them."""

import pytest
from helpers import chat_models
from helpers.llamafactory_runs import write_finished_stage1


def chat_inputs(board):
    """The chat tab's load button's inputs."""
    return next(fn for fn in board.blocks.fns.values() if fn.name == "load_model").inputs


def load(board, **values):
    data = {component: component.value for component in chat_inputs(board)}
    fixed = {"top__lang": "en", "top__model_name": "Custom", "top__template": "qwen"}
    data |= {board.component(id.replace("__", ".")): value for id, value in (fixed | values).items()}
    return list(board.engine.chatter.load_model(data))


def ask(board, strategy, language="en", question=chat_models.QUESTIONS[0]):
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


def test_the_switch_decides_how_an_answer_is_decoded(loaded, monkeypatch):
    chat_models.draft_in_every_step(monkeypatch)
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
    write_finished_stage1(folder)
    told = load(board, top__model_path=str(llama), top__finetuning_type="full", top__checkpoint_path="run")
    assert not board.engine.chatter.loaded
    assert "saves/Custom/full/run/lmtp" in told[-1]
