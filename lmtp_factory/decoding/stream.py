"""Streaming of tokens when the rows of a batch advance by different numbers of tokens."""

from transformers.generation.streamers import BaseStreamer

from .accept import Acceptor


class Stream:
    """Passes a (batch,) tensor per position to the streamer, as `generate` does, once every row has reached it.

    Args:
        streamer: The streamer, or None.
        acceptor: The acceptor that holds the sequences.
        pad_token: Token of positions beyond the end of a row.
    """

    def __init__(self, streamer: BaseStreamer | None, acceptor: Acceptor, pad_token: int | None):
        self.streamer, self.acceptor, self.pad_token = streamer, acceptor, pad_token
        self.place = acceptor.rows[0].length

    def flush(self) -> None:
        """Put all positions that every unfinished row has reached; ended rows are padded."""
        if self.streamer is None:
            return
        rows = self.acceptor.rows
        longest = max(row.length for row in rows)
        ready = min((row.length for row in rows if not row.done), default=longest)
        new = self.acceptor.sequences[:, self.place : ready].clone()
        for b, row in enumerate(rows):
            if row.length < ready:
                new[b, max(row.length - self.place, 0) :] = self.pad_token
        for place in range(new.shape[1]):
            self.streamer.put(new[:, place])
        self.place = max(ready, self.place)

    def end(self) -> None:
        """End the stream."""
        if self.streamer is not None:
            self.streamer.end()
