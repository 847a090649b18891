"""Project 8: KV cache and generation. Keys and values of what was read are kept, so a new token costs one step."""
