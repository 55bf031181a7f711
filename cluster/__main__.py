"""`python -m cluster`: the `trailmark` command of this very interpreter."""

from cluster.cli import main

main()
