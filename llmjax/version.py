"""The version, which a run keeps beside what it made."""

__version__ = "0.2.0"
