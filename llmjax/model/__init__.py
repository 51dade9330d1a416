"""The network: Flax Linen modules that are pure functions of parameters and tokens.

`transformer.py` is the model from top to bottom: embeddings, an encoder if there is one, the stack, the heads; `head.py`
is the one that makes logits, which a loss can also apply by chunks. `block.py` is one block and how blocks are stacked.
`attention.py`, `recurrent.py` (with `rglru.py`, `mamba2.py`, `convolution.py`), `layers.py` and `moe.py` (with
`routing.py`) hold the parts, `views.py` and `positions.py` who sees whom and where, `kernels.py` fast forms (for TPU
`kernels_splash.py`, in low precision `kernels_quantized.py`, and `kernels_local.py` for where they run), `init.py` how
parameters start, `cache.py` what goes from call to call, `count.py` what it costs.
Nothing here knows of meshes: activations are only labelled with the letters of their shape (`constrain(x_BLD, "BLD")`), and
`parallel/placement.py` says where those live.
"""
