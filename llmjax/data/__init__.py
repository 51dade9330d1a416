"""Everything that is read: from files and the standard library to documents, clean shards, token shards and batches.

The way of the data is `sources` -> `documents` -> `prepare` (clean, deduplicated shards, part of them held out) ->
`tokenizer` -> `tokens` -> `batches` (and their `mixture`). Each arrow leaves a folder in the run and can be rerun.
This room imports no JAX, so that data can be prepared on machines that have no accelerator, and batch number k is a
pure function of (config, seed, k).
"""
