"""Compare a file's contents with the model that it claims to hold, without running it."""
