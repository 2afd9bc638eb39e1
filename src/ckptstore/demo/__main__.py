"""``python -m ckptstore.demo``."""

import sys

from ckptstore.demo.director import main

sys.exit(main())
