"""Text from a model: an engine that writes many texts at a time, and what is built on it.

`generate` continues prompts, `Engine` takes requests that come and go, `beam.search` finds likely texts; `sample` has the
samplers, `speculative` several tokens a step, `constrained` texts of a given form, `weights` how decoding reads matrices.
"""
