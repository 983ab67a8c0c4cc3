"""Text: where it comes from, its token ids, and what is held out of training."""
