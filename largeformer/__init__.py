"""largeformer: from raw text to a trained, compressed Transformer, on two CPU cores or on a cluster."""

__version__ = "0.1.0"
