"""The steps that look at all documents at once."""
