"""The load onto a device, checked and measured by one command: see :mod:`loadtests.device_check.__main__`."""
