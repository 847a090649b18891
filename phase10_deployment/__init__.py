"""Phase 10: the roof: an engine behind an API, in a container, with a chat in the browser."""
