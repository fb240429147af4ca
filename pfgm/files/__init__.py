"""Reading and writing: whole files or none, locks, and files from strangers.

Whatever opens a file that the user names goes through this room. It imports only `pfgm.core`.
"""
