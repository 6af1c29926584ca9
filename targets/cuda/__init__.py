"""NVIDIA cards: facts, prices of dense and 2:4 products, and PyTorch's semi-structured path."""
