"""Foundations that know nothing of charges, networks or files.

Random numbers as functions of counters, objects that remember their constructor arguments, checks of tensors and arguments,
exit codes. This room imports nothing else of the package.
"""
