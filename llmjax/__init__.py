"""llmjax: the whole life cycle of a large language model in JAX, from raw text to a model you talk to."""

__version__ = "0.1.0"
