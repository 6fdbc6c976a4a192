"""`python -m rc_ray`, the same as `rc-ray`."""

import sys

from rc_ray.cli import main

sys.exit(main())
