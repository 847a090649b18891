"""Project 13: paged attention. Keys and values lie in blocks anywhere in memory; a table says where."""
