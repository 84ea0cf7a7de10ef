"""`python -m jaxrl.cli` is `jaxrl`."""

import sys

from jaxrl.cli import main

sys.exit(main())
