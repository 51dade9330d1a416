"""Measuring a model: for now how well it predicts text it has not seen."""
