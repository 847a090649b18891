"""Project 11: speculative decoding. A cheap draft guesses several tokens, the model checks them in one step."""
