"""Project 1: a minimal character-level GPT, complete in one file."""
