"""Chat with a GGUF on the terminal and in a browser."""
