"""The network: Flax Linen modules that are pure functions of parameters and tokens.

| file | what it holds |
|---|---|
| transformer.py | the model from top to bottom: embeddings, an encoder if there is one, stacks of blocks, heads |
| embedding.py, head.py | from ids to the residual stream; from hidden states to logits, also by chunks |
| block.py, stacks.py | one block and how blocks are run; which layers are stacked and scanned |
| attention.py, views.py, positions.py | attention; who sees whom; positions |
| recurrent.py, rglru.py, mamba2.py, gated_convolution.py, convolution.py | recurrent mixers |
| layers.py, moe.py, routing.py | linear maps, norms, MLPs; experts and how tokens are routed to them |
| cache.py, two_stream.py | what decoding carries from call to call; what only Transformer-XL and XLNet have |
| kernels.py, kernels_splash.py, kernels_quantized.py | fast forms for CPU, for TPU, in low precision |
| init.py, observed.py, count.py | how parameters start; parameters that no loss moves; what a model costs |
| per_device.py | running a function on each device's piece |

Nothing here knows of meshes. Activations carry the letters of their shape (`constrain(x_BLD, "BLD")`), and
`parallel/placement.py` says on which axes of a mesh the letters live. Another way to run layers or attention is a field of
the `Transformer`.
"""
