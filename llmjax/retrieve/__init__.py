"""Answers from databases and documents: find, write under a constraint, check, show the source."""
