"""Where arrays live, and how a network runs on many devices.

| file | what it holds |
|---|---|
| mesh.py | the mesh, from one line of config |
| placement.py | the table that places every parameter, and the one for activations; `on_mesh`, `active` |
| pipeline.py, context.py | layers in stages; attention in a ring over the positions of a row |
| processes.py | several processes of one run |
| reading.py | the mesh of a model that is only read |
| chips.py | what accelerators can do, as their makers publish it |
"""
