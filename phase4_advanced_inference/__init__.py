"""Phase 4: advanced inference: beginnings that are shared, guesses that are checked, batches that change, memory in pages."""
