"""Draft budget: limits the time that unsuccessful drafts can cost a generation.

The unit is the duration of a plain step, which yields one token. A step with a draft yields `accepted` more tokens and
takes `extra` longer, for the draft and the wider forward. Compared with plain steps it gains `accepted - extra`. The
balance is the sum of these gains. Steps draft while it is positive and are plain otherwise. Each plain step adds a
small allowance to the balance, which pays for an occasional draft; an accepted draft pays for the next one. The balance
starts at 0, or at a small stake if `lmtp-cli tree` has measured that drafts gain as much. A short answer could not earn
back a larger one. While the balance is smaller than the extra time of a step that may draft a whole tree, drafts are
probes: small trees, which cost less to fail.
"""

from collections import defaultdict, deque
from collections.abc import MutableMapping, Sequence
from statistics import median_low


# In plain steps. ALLOWANCE: added by each plain step. MOST: largest balance, which limits the loss on text that is
# harder than what came before. STAKE: largest balance at the start. Chosen with experiments/draft_budget.py.
ALLOWANCE, MOST, STAKE = 0.01, 3.0, 0.3
# Number of nodes of a probe, including the root.
PROBE_NODES = 4
# `extra` of a tree size before its first step, and its cap in that step, whose time may include kernel selection or int8
# quantisation.
_FIRST_EXTRA = 0.5
# Number of latest times per tree size, of which the median is used.
_TIMES = 7
# A plain step is timed first and then after so many drafts. The last interval repeats, because a longer context is
# slower.
_DRAFTS_BETWEEN_PLAIN = (4, 16, 64)


class DraftBudget:
    """Decides for each step of one generation how many nodes it may draft.

    Args:
        expected_gain: Gain of a step with a whole tree, as measured for this model on this device; 0 if it is unknown.
        allowance: Gain per plain step.
        most: Largest balance.

    Attributes:
        balance: Time that drafting may still lose, in plain steps.
    """

    def __init__(self, expected_gain: float = 0.0, allowance: float = ALLOWANCE, most: float = MOST):
        self.allowance, self.most = allowance, most
        self.balance = min(max(expected_gain, 0.0), STAKE)
        self._plain: deque[float] = deque(maxlen=_TIMES)
        # By number of verified nodes, and by number of nodes that the step might have, see `_times`.
        self._verified: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_TIMES))
        self._offered: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_TIMES))
        self._intervals = list(_DRAFTS_BETWEEN_PLAIN)
        self._drafts = 0  # number of drafts since the last plain step

    def affordable(self, nodes: int) -> int:
        """Return the number of nodes that the next step may verify, including the root. 1 is a plain step.

        Args:
            nodes: Number of nodes of a whole tree.
        """
        if not self._plain or self._drafts >= self._intervals[0] or self.balance <= 0:
            return 1
        return nodes if self.balance >= self._extra(_times(self._offered, nodes)) else min(nodes, PROBE_NODES)

    def record_plain(self, seconds: float) -> None:
        """Record the duration of a step without a draft."""
        self._plain.append(seconds)
        self.balance = min(self.balance + self.allowance, self.most)
        if self._drafts >= self._intervals[0] and len(self._intervals) > 1:
            self._intervals.pop(0)
        self._drafts = 0

    def record_draft(self, seconds: float, nodes: int, accepted: float, offered: int | None = None) -> None:
        """Record a step with a draft.

        Args:
            seconds: Duration of the step, from the draft to the commit.
            nodes: Number of verified nodes, including the root.
            accepted: Number of accepted drafted tokens, averaged over the rows.
            offered: Number of nodes that the step might have, of which a cost curve may have cut some. Default `nodes`.
        """
        times = _times(self._verified, nodes)
        times.append(seconds)
        _times(self._offered, nodes if offered is None else offered).append(seconds)
        self.balance = min(self.balance + accepted - self._extra(times), self.most)
        self._drafts += 1

    def _extra(self, times: Sequence[float]) -> float:
        """Return how much longer than a plain step a step with a draft takes, in plain steps.

        Args:
            times: Durations of such steps, from `_times`.
        """
        if not times:
            return _FIRST_EXTRA
        # Not below 0: one slow plain step must not make drafts look free.
        extra = max(median_low(times) / median_low(self._plain) - 1, 0.0)
        return min(extra, _FIRST_EXTRA) if len(times) == 1 else extra


def _times(durations: MutableMapping[int, deque[float]], nodes: int) -> deque[float]:
    """Return the durations of steps with about as many nodes: sizes within a factor of two share them."""
    return durations[(nodes - 1).bit_length()]
