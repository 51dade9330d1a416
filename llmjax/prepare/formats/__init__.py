"""The kinds of files that documents come in, each with what turns its bytes into text."""


class RejectedError(Exception):
    """A document without text; the message is the reason for its rejection."""


def is_panic(error: BaseException) -> bool:
    """Whether a parser written in Rust gave up. Its exception is no `Exception`, and no module has its name."""
    return type(error).__name__ == "PanicException"
