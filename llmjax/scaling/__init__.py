"""Plan a run before anyone rents a chip: does it fit, what does it send, how long does it take, what does it cost."""
