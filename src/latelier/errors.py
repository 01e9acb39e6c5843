"""The errors that a user is meant to read."""


class LatelierError(Exception):
    """Bad input: one sentence with the offending value and what to do.

    The command line prints the sentence and exits with code 2; anything else that escapes is a bug and keeps its
    traceback.
    """


class NotMeasurable(LatelierError):
    """A number that these images, or this model, do not allow: it is left out, and everything else is measured."""
