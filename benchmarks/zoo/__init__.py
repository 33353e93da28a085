"""Architectures of timm, torchvision, transformers and torch with random weights: what becomes of each."""
