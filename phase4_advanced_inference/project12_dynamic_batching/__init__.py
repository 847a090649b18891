"""Project 12: requests join and leave the batch at every step."""
