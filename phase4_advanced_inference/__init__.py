"""Phase 4, advanced inference: what many requests share, and how they share a model."""
