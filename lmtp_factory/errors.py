"""The exception for mistakes that the user can fix."""


class LMTPError(ValueError):
    """A mistake that the user can fix. The message says in one sentence what is wrong and what to write instead."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, without the final full stop."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
