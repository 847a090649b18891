"""Project 13: the cache in blocks, and the engine core over it."""
