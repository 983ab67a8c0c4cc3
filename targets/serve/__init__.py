"""Chat with a GGUF in the terminal and in a browser."""
