"""
Programs over the trainer: an app is one folder, and the command that runs it is a file of that folder.
"""
