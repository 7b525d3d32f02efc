"""`treepo-trl train`: a training from a command line or a file."""
