"""Measuring a model: how well it predicts text it has not seen, and how well it does at what others measure too.

`bits_per_byte` scores documents, `likelihood` continuations (`rows` shares their contexts). Benchmarks come from local
files (`local_data`); `native` runs the multiple-choice ones with the prompts of lm-evaluation-harness (`prompts`),
`harness` everything that it has, `code` programs, in a `sandbox`. `tasks` is what the command calls. `ratings`, `rate`
and `judge` compare answers. `statistics` says how sure a score is, `contamination` whether its questions were seen.
"""
