"""The ways to decode, for those who must not import a decoder to name them."""

# ``backward`` looks back, ``forward`` is the paper's F-MTP, ``off`` is stock; ``auto`` looks back where there are heads.
STRATEGIES = ("auto", "backward", "forward", "off")
