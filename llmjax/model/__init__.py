"""The network: Flax Linen modules that are pure functions of parameters and tokens.

`decoder.py` is the model from top to bottom; `attention.py` and `layers.py` hold its parts, `init.py` how they
start. Nothing here knows of meshes: activations are only labelled with the letters of their shape
(`label(x_BLD, "BLD")`), and `parallel/placement.py` says where those live.
"""
