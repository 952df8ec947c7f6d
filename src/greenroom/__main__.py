"""`python -m greenroom` is the `greenroom` command."""

import sys

from greenroom.commands import main

sys.exit(main())
