"""Project 2: a byte-level BPE tokenizer, as readable reference and as fast path."""
