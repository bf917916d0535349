"""`python -m bnaudit` is `bnaudit`."""

from bnaudit.cli import main

main()
