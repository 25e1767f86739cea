"""``python -m fastsae`` is the command ``fastsae``."""

from fastsae.cli import main

main()
