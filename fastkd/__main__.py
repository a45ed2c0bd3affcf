"""``python -m fastkd``: the ``fastkd`` command."""

import sys

from .cli import main

sys.exit(main())
