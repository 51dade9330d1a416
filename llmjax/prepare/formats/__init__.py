"""The kinds of files that documents come in, each with what turns its bytes into text."""


class RejectedError(Exception):
    """A document without text; the message is the reason for its rejection."""
