"""`python -m meshnode.trainer`: see `child.py`."""

from __future__ import annotations

import sys

from meshnode.trainer.child import main

sys.exit(main(sys.argv[1:]))
