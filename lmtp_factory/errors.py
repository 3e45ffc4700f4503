"""The one exception type for mistakes that the user can mend."""


class LMTPError(ValueError):
    """A mistake of the user's, told in one sentence that says what to write instead."""
