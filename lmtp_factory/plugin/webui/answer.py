"""What the Chat tab shows below an answer: its speed, and which of its tokens had been drafted."""

from collections.abc import Callable, Iterator, Sequence
from html import escape
from types import ModuleType
from typing import TYPE_CHECKING

from .. import hooks
from .locales import alert


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..chat import Wish


STYLE = """
.lmtp-answer {
  margin-top: 10px !important;
  color: var(--body-text-color-subdued);
  font-size: var(--text-sm);
}

.lmtp-answer summary {
  cursor: pointer;
}

.lmtp-answer div {
  border-left: 2px solid var(--border-color-primary);
  margin: 6px 0;
  padding-left: 10px;
}

.lmtp-drafted {
  background: var(--color-green-100, #dcfce7);
  border-radius: 3px;
  color: #14532d;
}

.dark .lmtp-drafted {
  background: #14532d;
  color: #dcfce7;
}
"""


def extend_css(css: ModuleType) -> None:
    """Add the style of what is shown below an answer."""
    css.CSS = hooks.expect(css, "CSS") + STYLE


def summary(wish: "Wish", tokenizer: "PreTrainedTokenizerBase", language: str) -> str:
    """One line with the answer's counts, which opens to show its tokens; HTML for a chat message."""
    stats = wish.stats
    line = alert("lmtp_answer", language).format(
        tokens=stats.tokens, speed=f"{stats.tokens_per_second:.1f}", tau=f"{stats.tau:.2f}", strategy=stats.strategy
    )
    marked = drafted(stats.advances, len(wish.tokens))
    if not any(marked):
        return f"\n\n<div class='lmtp-answer'>{escape(line)}</div>"
    pieces = pieces_of(wish.tokens, marked, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    text = "".join(
        f"<span class='lmtp-drafted'>{_html(piece)}</span>" if is_drafted else _html(piece)
        for piece, is_drafted in pieces
    )
    hint = escape(alert("lmtp_drafted", language))
    return f"\n\n<details class='lmtp-answer'><summary>{escape(line)} · {hint}</summary><div>{text}</div></details>"


def drafted(advances: Sequence[int], length: int) -> list[bool]:
    """For each of ``length`` tokens whether it was drafted; the first one is the prompt's forward's."""
    marked = [False]
    for advance in advances:
        marked += [True] * (advance - 1) + [False]
    return (marked + [False] * length)[:length]


def pieces_of(
    tokens: Sequence[int], marked: Sequence[bool], decode: Callable[[Sequence[int]], str]
) -> Iterator[tuple[str, bool]]:
    """The text in pieces of equal marks; a character of several tokens goes with its last one."""
    shown = ""
    for place in range(len(tokens)):
        is_end = place + 1 == len(tokens)
        if not is_end and marked[place + 1] == marked[place]:
            continue
        text = decode(tokens[: place + 1])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not is_end:
            continue
        if text[len(shown) :]:
            yield text[len(shown) :], marked[place]
        shown = text


def _html(text: str) -> str:
    # A blank line would end the HTML for Markdown, dollars would begin a formula.
    return escape(text).replace("\n", "<br>").replace("$", "&#36;").replace("\\", "&#92;")
