"""`python -m lrc_edge`, for torchrun and accelerate launch: they start modules."""
from lrc_edge.cli import main

main()
