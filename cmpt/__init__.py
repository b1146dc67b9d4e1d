"""Pre-training of CLIP-style image-text models with cluster masking."""

__version__ = "0.1.0"
