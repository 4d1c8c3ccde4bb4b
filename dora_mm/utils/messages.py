"""Errors of other libraries in messages of one sentence."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
