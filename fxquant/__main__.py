"""``python -m fxquant``."""

from .cli import main

main()
