"""Reading and writing: whole files or none, locks, and files of unknown origin.

Whatever opens a file that the user names goes through this room. It imports only `pfgm.core`.
"""
