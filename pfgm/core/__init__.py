"""Foundations that know nothing of charges, networks or files.

This room holds random numbers as functions of counters, objects that record their constructor arguments, checks of tensors and
arguments, and exit codes. It imports nothing else of the package.
"""
