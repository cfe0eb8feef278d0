"""From bytes in files to a parameter: the lazy tensor, reading, combining, threads, devices."""
