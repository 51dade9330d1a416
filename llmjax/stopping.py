"""The one exception that is not an error: a run was asked to stop and has saved."""


class Stopped(Exception):  # noqa: N818
    """Training was stopped by a signal after its state was saved; the message says where."""
