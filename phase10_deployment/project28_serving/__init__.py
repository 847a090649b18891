"""Project 28: an engine behind an OpenAI-compatible API."""
