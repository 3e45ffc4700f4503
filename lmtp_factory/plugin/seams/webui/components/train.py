"""Adds the L-MTP panel to the Train tab."""

import functools
from types import ModuleType

from .... import hooks
from ....webui.fields import stage_of
from ....webui.panel import Panel
from ....webui.wiring import place_before


def extend(train: ModuleType) -> None:
    """Wrap `create_train_tab`: it builds the panel and makes the panel's fields inputs of upstream's buttons."""
    from llamafactory.webui.manager import Manager

    upstream = hooks.expect(train, "create_train_tab", "engine")
    change_stage = hooks.expect(train, "change_stage", "training_stage")
    hooks.expect(Manager, "get_base_elems")

    @functools.wraps(upstream)
    def create_train_tab(engine):
        try:
            panel = Panel()
        except Exception as error:  # another gradio version
            hooks.fail(train.__name__, error)
            return upstream(engine)
        base = engine.manager.get_base_elems
        engine.manager.get_base_elems = lambda: base() | panel.inputs  # upstream's list of inputs starts with these
        try:
            elements = upstream(engine)
        finally:
            del engine.manager.get_base_elems
        elements |= panel.elements
        engine.manager.add_elems("train", elements)  # upstream does it again with the returned elements
        try:
            place_before(panel.accordion, elements["extra_tab"])
            panel.connect(engine)
        except Exception as error:  # the panel then stays invisible
            hooks.fail(train.__name__, error)
        return elements

    @functools.wraps(change_stage)
    def change_stage_keeping_data(training_stage):
        # Upstream clears the dataset, also when saved arguments are loaded. L-MTP stages read what plain SFT reads.
        if stage_of(training_stage) is None:
            return change_stage(training_stage)
        import gradio as gr

        return gr.skip(), gr.skip()

    train.create_train_tab = create_train_tab
    train.change_stage = change_stage_keeping_data
