"""Makes the served dashboard importable: test modules are imported one by one, not as packages."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
