"""Text from a model: `sample` picks tokens from logits, `generate` runs the decoder with its cache.

Every function here is pure or keeps its state in one call; requests that come and go are the server's business.
"""
