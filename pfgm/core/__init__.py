"""Random numbers as functions of counters, objects that record their constructor arguments, checks, and exit codes.

This room knows nothing of charges, networks or files, and imports nothing else of the package.
"""
