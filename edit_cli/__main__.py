"""`python -m edit_cli`: what `torchrun -m edit_cli …` and `accelerate launch -m edit_cli …` start."""

from edit_cli.cli.main import main

main()
