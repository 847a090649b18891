"""Phase 1, foundation: from raw text to a pre-trained language model."""
