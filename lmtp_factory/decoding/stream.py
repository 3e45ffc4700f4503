"""Handing tokens to a streamer in order, also where the rows of a batch advance by different numbers of tokens."""

from transformers.generation.streamers import BaseStreamer

from .accept import Acceptor


class Stream:
    """Puts one (batch,) tensor a place to the streamer, as stock `generate` does, once every row has got there."""

    def __init__(self, streamer: BaseStreamer | None, acceptor: Acceptor, pad_token: int | None):
        self.streamer, self.acceptor, self.pad_token = streamer, acceptor, pad_token
        self.place = acceptor.rows[0].length

    def flush(self) -> None:
        """Put what has become complete; finished rows wait with padding."""
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
        """Say that nothing follows."""
        if self.streamer is not None:
            self.streamer.end()
