"""Emulated processors, browsers and node, and how to install them."""
