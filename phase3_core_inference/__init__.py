"""Phase 3: core inference: numbers in fewer bits, keys and values that are kept, attention in tiles."""
