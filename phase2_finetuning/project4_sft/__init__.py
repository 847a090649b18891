"""Project 4: supervised fine-tuning, which turns a language model into one that holds a conversation."""
