"""`python -m squeezed.cli`."""

import sys

from squeezed.cli import main

sys.exit(main())
