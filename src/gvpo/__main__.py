"""`python -m gvpo`: the command, for launchers such as torchrun."""

from __future__ import annotations

import sys

from gvpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
