"""Project 30: a chat page, and a playground that shows what the other projects do."""
