"""Kept samples for training and analysis: PyTorch, Arrow, Hugging Face datasets."""
