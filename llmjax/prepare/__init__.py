"""Text preparation: sources become clean, deduplicated, decontaminated shards, and nothing is thrown away unseen."""
