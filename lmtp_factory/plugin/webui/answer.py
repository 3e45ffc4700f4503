"""HTML below an answer of the Chat tab: its speed, and which of its tokens were drafted."""

from collections.abc import Callable, Iterator, Sequence
from html import escape

from transformers import PreTrainedTokenizerBase

from ..chat import ChatRequest
from .texts import alert


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


def summary(request: ChatRequest, tokenizer: PreTrainedTokenizerBase, language: str) -> str:
    """HTML for a chat message: one line of statistics, which opens to show the answer's tokens."""
    stats = request.stats
    line = alert("lmtp_answer", language).format(
        tokens=stats.tokens, speed=f"{stats.tokens_per_second:.1f}", tau=f"{stats.tau:.2f}", strategy=stats.strategy
    )
    marked = drafted(stats.advances, len(request.tokens))
    if not any(marked):
        return f"\n\n<div class='lmtp-answer'>{escape(line)}</div>"
    pieces = pieces_of(request.tokens, marked, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    text = "".join(
        f"<span class='lmtp-drafted'>{_html(piece)}</span>" if is_drafted else _html(piece)
        for piece, is_drafted in pieces
    )
    hint = escape(alert("lmtp_drafted", language))
    return f"\n\n<details class='lmtp-answer'><summary>{escape(line)} · {hint}</summary><div>{text}</div></details>"


def drafted(advances: Sequence[int], length: int) -> list[bool]:
    """For each of `length` tokens, whether it was drafted. The forward of the prompt gives the first one.

    Args:
        advances: Number of tokens that each later forward gave; its last one is not drafted.
        length: Number of tokens.
    """
    marked = [False]
    for advance in advances:
        marked += [True] * (advance - 1) + [False]
    return (marked + [False] * length)[:length]


def pieces_of(
    tokens: Sequence[int], marked: Sequence[bool], decode: Callable[[Sequence[int]], str]
) -> Iterator[tuple[str, bool]]:
    """Pieces of text with equal marks. A character of several tokens has the mark of its last token."""
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
    # In Markdown a blank line would end the HTML, and a dollar sign would begin a formula.
    return escape(text).replace("\n", "<br>").replace("$", "&#36;").replace("\\", "&#92;")
