"""`python -m llmjax`: the installed command."""

from llmjax.start import script

script()
