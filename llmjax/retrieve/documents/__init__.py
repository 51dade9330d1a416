"""Questions to documents: reading, blocks, the index, search, and citations that are checked."""
