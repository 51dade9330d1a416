"""Hugging Face in and out: what their config and tensors are called here (`mapping.py`, `families/`), and the files."""
