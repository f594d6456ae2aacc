"""``python -m stiefel`` is the ``stiefel`` command."""

from stiefel.cli import main

main()
