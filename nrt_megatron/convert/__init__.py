"""Hugging Face and Megatron: one table of names and shapes, used in both directions."""
