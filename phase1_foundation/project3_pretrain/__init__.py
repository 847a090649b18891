"""Project 3: the decoder of every later project, and the loop that pre-trains it."""
