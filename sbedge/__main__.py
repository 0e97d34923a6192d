"""`python -m sbedge` is the `sbedge` command."""
import sys

from sbedge.apps.cli import main

sys.exit(main())
