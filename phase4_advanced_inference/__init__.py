"""Phase 4: advanced inference: shared beginnings, checked guesses, batches that change, memory in pages."""
