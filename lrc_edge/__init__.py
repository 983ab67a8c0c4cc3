"""lrc-edge: an edge-deployment compiler from a Hugging Face teacher to an on-device student."""

__version__ = "0.1.0"
