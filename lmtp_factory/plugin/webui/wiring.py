"""Changes to a page that upstream has built: the place of a component, and another input of a handler."""

from collections.abc import Callable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from gradio.blocks import Block
    from gradio.components import Component


def place_before(component: "Block", neighbour: "Block") -> None:
    """Move a new component to the place before another one."""
    component.parent.children.remove(component)
    siblings = neighbour.parent.children
    siblings.insert(siblings.index(neighbour), component)
    component.parent = neighbour.parent


def add_input(handler: Callable, component: "Component") -> None:
    """Append the component's value to the arguments with which the page calls `handler`.

    Raises:
        LookupError: The page never calls it with a list of inputs.
    """
    from gradio.context import Context

    calls = [call for call in Context.root_block.fns.values() if call.fn == handler and not call.inputs_as_dict]
    if not calls:
        raise LookupError(f"nothing calls {handler.__name__}")
    for call in calls:
        call.inputs = [*call.inputs, component]
