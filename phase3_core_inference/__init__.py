"""Phase 3: core inference: numbers of fewer bits, keys and values that are kept, attention in tiles."""
