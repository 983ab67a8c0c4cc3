"""`python -m lrc_edge`, for torchrun and accelerate launch, which start modules."""
from lrc_edge.cli import main

main()
