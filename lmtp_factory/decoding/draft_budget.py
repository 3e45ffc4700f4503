"""When to draft: drafts may cost a generation a small share of its time and no more, whatever the text is.

A plain step brings one token; its time is the unit here. A step with a draft brings `accepted` tokens more and takes
longer, by the draft and the wider forward. It gains `accepted - extra time` tokens over plain steps. The balance adds up
these gains. While it is used up, steps are plain. Each plain step adds a little to it, which pays for a draft now and then,
and one that is accepted pays for the next.
"""

from collections import defaultdict, deque
from statistics import median_low


# In plain steps: what drafting may lose before anything is known of the text, what a plain step adds to that, and the most
# that good text lays up for bad text behind it. Chosen by experiments/draft_budget.py.
STAKE, ALLOWANCE, MOST = 1.0, 0.005, 3.0
# A size of tree that was timed once may have spent that time on choosing kernels or making int8 weights: until it is timed
# again its extra time counts as no more than this.
_FIRST_EXTRA = 0.5
# The last times of each size, of which the median counts.
_TIMES = 7
# Plain steps are timed first, then again after so many drafts; at last rarely, only because a longer context is slower.
_DRAFTS_BETWEEN_PLAIN = (4, 16, 64)


class DraftBudget:
    """Whether the steps of one generation draft.

    Attributes:
        balance: what drafting may still lose, in plain steps.
    """

    def __init__(self, stake: float = STAKE, allowance: float = ALLOWANCE, most: float = MOST):
        self.allowance, self.most = allowance, most
        self.balance = stake
        self._plain: deque[float] = deque(maxlen=_TIMES)
        self._drafted: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_TIMES))
        self._intervals = list(_DRAFTS_BETWEEN_PLAIN)
        self._drafts = 0  # since a plain step was timed

    def allows_draft(self) -> bool:
        """Whether the next step may draft."""
        return bool(self._plain) and self._drafts < self._intervals[0] and self.balance > 0

    def record_plain(self, seconds: float) -> None:
        """Account for a step without a draft."""
        self._plain.append(seconds)
        self.balance = min(self.balance + self.allowance, self.most)
        if self._drafts >= self._intervals[0] and len(self._intervals) > 1:
            self._intervals.pop(0)
        self._drafts = 0

    def record_draft(self, seconds: float, nodes: int, accepted: float) -> None:
        """Account for a step with a draft.

        Args:
            seconds: of the whole step, from the draft to the commit.
            nodes: verified in it, the root counted.
            accepted: drafted tokens that were accepted, the mean over the rows.
        """
        times = self._drafted[nodes.bit_length()]  # sizes within a factor of two share their times
        times.append(seconds)
        extra = median_low(times) / median_low(self._plain) - 1
        if len(times) == 1:
            extra = min(extra, _FIRST_EXTRA)
        self.balance = min(self.balance + accepted - extra, self.most)
        self._drafts += 1
