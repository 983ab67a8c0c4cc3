"""Text: its sources, its token ids, and what is held out of training."""
