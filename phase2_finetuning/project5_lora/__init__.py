"""Project 5: LoRA, small trained updates beside frozen weights."""
