"""Tokenized text on disk, and the rows that training reads."""
