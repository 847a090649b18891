"""Project 29: the server, its chat and its dashboards in containers."""
