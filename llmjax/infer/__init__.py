"""Text from a model: an engine that writes many texts at a time, and what is built on it.

`generate` continues prompts, `Engine` takes requests that come and go and tells what becomes of them as events; `request`
says what a request may be, `scheduler` who is read and written when, `prefixes` what is known of prompts; `sample` has the
samplers, `speculative` several tokens a step, `constrained` texts of a given form, `weights` how decoding reads matrices.
"""
