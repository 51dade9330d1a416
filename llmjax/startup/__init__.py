"""What a command does before its work: the flags of XLA, a cache of programs and weights between starts, timings."""
