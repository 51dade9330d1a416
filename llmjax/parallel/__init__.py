"""Where arrays live: the mesh from one config line, and the table that places every parameter on it."""
