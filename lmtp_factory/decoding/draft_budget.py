"""Draft budget: limits the time that unsuccessful drafts can cost a generation.

The unit is the duration of a plain step, which yields one token. A step with a draft yields `accepted` more tokens and
takes `extra` longer, for the draft and the wider forward. Compared with plain steps it gains `accepted - extra`. The
balance is the sum of these gains. Steps draft while it is positive and are plain otherwise. Each plain step adds a
small allowance to the balance, which pays for an occasional draft; an accepted draft pays for the next one. The balance
starts at 0, because a short answer could not earn back an initial stake.
"""

from collections import defaultdict, deque
from statistics import median_low


# In plain steps. ALLOWANCE: added by each plain step. MOST: largest balance, which limits the loss on text that is
# harder than what came before. Chosen with experiments/draft_budget.py.
ALLOWANCE, MOST = 0.01, 3.0
# Cap of `extra` for the first step with a tree size: its time may include kernel selection or int8 quantisation.
_FIRST_EXTRA = 0.5
# Number of latest times per tree size, of which the median is used.
_TIMES = 7
# A plain step is timed first and then after so many drafts. The last interval repeats, because a longer context is
# slower.
_DRAFTS_BETWEEN_PLAIN = (4, 16, 64)


class DraftBudget:
    """Decides for each step of one generation whether it drafts.

    Args:
        allowance: Gain per plain step.
        most: Largest balance.

    Attributes:
        balance: Time that drafting may still lose, in plain steps.
    """

    def __init__(self, allowance: float = ALLOWANCE, most: float = MOST):
        self.allowance, self.most = allowance, most
        self.balance = 0.0
        self._plain: deque[float] = deque(maxlen=_TIMES)
        self._drafted: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_TIMES))
        self._intervals = list(_DRAFTS_BETWEEN_PLAIN)
        self._drafts = 0  # number of drafts since the last plain step

    def allows_draft(self) -> bool:
        """Return whether the next step may draft."""
        return bool(self._plain) and self._drafts < self._intervals[0] and self.balance > 0

    def record_plain(self, seconds: float) -> None:
        """Record the duration of a step without a draft."""
        self._plain.append(seconds)
        self.balance = min(self.balance + self.allowance, self.most)
        if self._drafts >= self._intervals[0] and len(self._intervals) > 1:
            self._intervals.pop(0)
        self._drafts = 0

    def record_draft(self, seconds: float, nodes: int, accepted: float) -> None:
        """Record a step with a draft.

        Args:
            seconds: Duration of the step, from the draft to the commit.
            nodes: Number of verified nodes, including the root.
            accepted: Number of accepted drafted tokens, averaged over the rows.
        """
        times = self._drafted[nodes.bit_length()]  # sizes within a factor of two share their times
        times.append(seconds)
        # Not below 0: one slow plain step must not make drafts look free.
        extra = max(median_low(times) / median_low(self._plain) - 1, 0.0)
        if len(times) == 1:
            extra = min(extra, _FIRST_EXTRA)
        self.balance = min(self.balance + accepted - extra, self.most)
        self._drafts += 1
