"""Phase 2: from a model that continues text to one that answers: fine-tuning, adapters, preferences."""
