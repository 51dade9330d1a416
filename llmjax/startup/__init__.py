"""Before the work of a command: flags of XLA, accelerators, the cache of programs and weights, timings."""
