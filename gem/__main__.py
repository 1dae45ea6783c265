"""`python -m gem`, and `accelerate launch -m gem`."""

from gem.cli import main

main()
