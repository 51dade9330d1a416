"""Evaluation: how well a model predicts held-out text, and its scores on public benchmarks.

`likelihood` scores continuations (`trees` shares their contexts). Benchmarks come from local files (`local_data`).
`native` runs multiple-choice tasks with the prompts of lm-evaluation-harness (`prompts`), `harness` runs every task of
it, `code` runs programs in a `sandbox`, and `tasks` calls all of them for the command. `ratings`, `rate` and `judge`
compare answers of two systems. `statistics` gives standard errors, and `contamination` finds questions in the training
text.
"""
