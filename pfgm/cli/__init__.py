"""The command line: training, sampling, editing, averaging and advice, and how commands end.

This room imports every other room, and no other room imports it.
"""
