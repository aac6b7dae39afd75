"""Turn a pinned TensorRT-LLM release into a standalone, verified W4A16 kernel library."""

__version__ = "0.1.0"
