"""The one exception type for mistakes that the user can mend, and a help to word it."""


class LMTPError(ValueError):
    """A mistake of the user's, told in one sentence that says what to write instead."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, short enough for one of our sentences."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
