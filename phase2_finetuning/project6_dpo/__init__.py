"""Project 6: direct preference optimization, which teaches a model that answers which answers people prefer."""
