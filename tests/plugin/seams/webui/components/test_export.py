"""The Export tab's handler, called as the page calls it."""

from lmtp_factory.plugin.webui.fields import with_key


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
