"""The version of expo-serve; the newest heading of CHANGELOG.md names the same one."""

__version__ = "0.1.0"
