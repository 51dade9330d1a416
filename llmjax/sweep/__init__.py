"""Studies of many runs: sweeps, scaling laws, budgets."""
