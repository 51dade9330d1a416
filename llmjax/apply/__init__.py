"""What a model does by prompt with each row of a file: summaries, translations, classes, programs."""
