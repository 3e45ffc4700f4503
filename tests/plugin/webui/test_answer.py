"""What the page marks in an answer."""

from lmtp_factory.plugin.webui import answer


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
