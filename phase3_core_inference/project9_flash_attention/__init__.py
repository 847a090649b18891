"""Project 9: FlashAttention, tiled exact attention in plain PyTorch, Triton and Gluon."""
