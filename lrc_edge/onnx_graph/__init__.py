"""The decoder as an ONNX graph, for exported files and for files with random weights. Needs no PyTorch."""
