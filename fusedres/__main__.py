"""`python -m fusedres`, the same program as `fusedres`."""

import sys

from fusedres.cli import main

sys.exit(main())
