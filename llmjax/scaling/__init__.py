"""Plans of runs on pods, before any chip is rented: memory, communication, time and cost."""
