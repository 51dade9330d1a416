"""Personas: a simulation of somebody from their writings, which says so, quotes them, and declines what they do not cover.

`rights` is read first, `texts` and `speakers` read the writings, `style` and `delta` measure them, `threshold` finds out
which questions to decline, `build` puts a persona together, `card` keeps it, and `reply` answers as it.
"""
