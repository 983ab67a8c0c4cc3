"""Write ONNX folders."""
