"""Models of text that judge documents: a classifier, a language model of bytes, and word lists."""
