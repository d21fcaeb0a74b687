"""The model: plain PyTorch modules, packed sequences, released-checkpoint names. Imports torch only."""
