"""The steps that look at one document at a time, each a pure function from record batch to record batch."""
