"""Personas: a simulation of somebody from their writings, which says so, quotes them, and declines what they do not cover.

`rights` is read first, `texts` and `speakers` read the writings, `style` and `delta` measure them, `threshold` measures
which questions to decline, `build` makes the persona, `card` stores it, and `reply` answers in its name.
"""
