"""From clean documents to batches.

The way of the data is `prepare/` (sources become clean shards, part of them held out) -> `documents` -> `tokenizer` ->
`tokens` (streams of ids) -> `batches` (and their `mixture`). Each arrow leaves a folder in the run and can be rerun.
This room imports no JAX, so that data can be made ready on machines that have no accelerator, and batch number k is a
pure function of (config, seed, k).
"""
