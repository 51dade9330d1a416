"""Text from a model.

`language_model` loads a model, which generates and scores. `generate` continues prompts in one call, `batch` answers a file
of them, `chat` holds a conversation, and `score` measures bits per byte of documents. `engine` answers
requests that come and go, and `beam` finds the likeliest text. Below them: `request` defines and checks requests,
`scheduler` decides which slot reads and which one writes, `prefixes` finds prompts that begin alike, `slots` and `steps`
are the arrays and programs on the device, `sample` has the samplers, `speculative` decodes several tokens a step,
`constrained` follows a schema or grammar, and `weights` prepares matrices for decoding.
"""
