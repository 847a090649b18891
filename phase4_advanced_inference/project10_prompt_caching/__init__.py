"""Project 10: prompt caching."""
