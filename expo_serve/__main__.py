"""``python -m expo_serve`` is the same as the command ``expo-serve``."""

import sys

from expo_serve.cli.main import main

sys.exit(main())
