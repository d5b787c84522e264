"""The two Python files an exported model folder carries, so that PyTorch's transformers can load it."""
