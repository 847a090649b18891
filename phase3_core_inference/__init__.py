"""Phase 3: precision, caches and attention kernels."""
